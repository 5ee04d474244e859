"""Models of other packages as a `corm_jax.Decoder`: their code, their weights, attention through evicting caches."""

from corm_jax.adapters.functions import Functions

__all__ = ["Functions"]
