"""What every decoder is held to: logits, keys and generated tokens, whoever wrote its layers."""

import jax
import jax.numpy as jnp
import numpy as np

from corm_jax import Full, generate, parse, prefill
from corm_jax.core.step import read
from corm_jax.model.decoder import check_decoder, forward, make_caches, policies_of
from simulator.reading import Form
from tests.drive import in_numpy
from tests.heads import live_sets

TOKENS, VOCAB = 24, 97
POLICIES = ["corm:window=5,recent=2", "h2o:recent=2,budget=7"]
IDS = np.random.default_rng(0).integers(1, VOCAB, (2, TOKENS)).astype(np.int32)


def check(model, logits, atol=1e-5):
    """Holds a decoder of `VOCAB` ids to the logits ``[2, TOKENS, VOCAB]`` that its package has for `IDS`.

    - With every key kept, in two blocks, its logits are these, but for ``atol`` of the largest.
    - Under each policy, every layer and head ends with the keys that the specification in NumPy keeps of the queries,
      keys and values that the layer has had.
    - Rows of different lengths are continued.
    """
    check_decoder(model, "the model")
    assert np.abs(logits).max() > 1, "logits that are all alike show nothing"
    caches, found = make_caches(model, Full(), batch=2, capacity=TOKENS), []
    run = jax.jit(forward, static_argnames="chunk")
    for part in np.split(IDS, 2, axis=1):
        x, caches, _ = run(model, Full(), caches, part, np.full(2, TOKENS // 2, np.int32), chunk=1)
        found.append(np.asarray(model.logits(x), np.float32))
    np.testing.assert_allclose(np.concatenate(found, axis=1), logits, rtol=0, atol=atol * np.abs(logits).max())
    for policy in map(parse, POLICIES):
        caches = prefill(model, policy, make_caches(model, policy, batch=2, capacity=TOKENS), IDS)[1]
        layers, evicted, close = attended(model, policy), 0, 0
        for (q, k, v, form), cache, one in zip(layers, caches, policies_of(model, policy), strict=True):
            for row in range(2):
                grouped = q[row].reshape(TOKENS, k.shape[2], -1, q.shape[-1])
                expected = in_numpy(one, grouped, k[row], v[row], [1] * TOKENS, form=form)
                for head, reading in enumerate(expected):
                    if reading.margin < 1e-5:  # float32 may decide either way
                        close += 1
                        continue
                    assert live_sets(np.asarray(cache.position[row, head])) == reading.kept[-1]
                    evicted += TOKENS - len(reading.kept[-1])
        assert evicted > 0
        assert close <= len(layers) * model.config.kv_heads // 2, "of two rows: a quarter"
    tokens = generate(model, policy, [IDS[0].tolist(), [5]], max_new_tokens=4).tokens
    assert [len(one) for one in tokens] == [4, 4]


def attended(model, policy):
    """What each layer attends with while the policy evicts: queries, keys, values, and the form of the attention."""
    position, layers = jnp.tile(jnp.arange(TOKENS, dtype=jnp.int32), (2, 1)), []
    caches, x = make_caches(model, policy, batch=2, capacity=TOKENS), model.embed(jnp.asarray(IDS), position)
    for layer, cache, one in zip(model.layers, caches, policies_of(model, policy), strict=True):
        forms = []

        @jax.jit
        def run(layer, x, cache, one=one, forms=forms):
            found = []

            def attend(q, k, v, encoding=None, **form):
                grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
                step = jax.vmap(lambda *row: read(one, *row, TOKENS, encoding, chunk=1, **form)[0])
                found.append((q, k, v))
                about = form | {"frequencies": None if encoding is None else np.asarray(encoding.frequencies)}
                forms.append({name: value for name, value in about.items() if value is not None})
                return step(cache, grouped, k, v).reshape(q.shape)

            return layer(x, position, attend), found[0]

        x, columns = run(layer, x, cache)
        layers.append((*map(np.asarray, columns), Form(**forms[0])))
    return layers
