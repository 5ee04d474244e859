"""Traces in memory: any float dtype comes in, float32 comes out, and what cannot be in a trace is an error."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from corm_jax import Corm, Full
from corm_jax.traces.arrays import TraceError
from corm_jax.traces.meta import QKV, Meta, Rows
from corm_jax.traces.trace import Trace
from simulator.oracle import bounds
from simulator.replay import replay

PIECES = ("It", " was", " the", " né", "\n", "😀")
TEXT = {"model": "tiny", "tokens": [5, 3, 0, 9, 9, 2], "pieces": list(PIECES)}


def qkv():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(3, 6, heads, 8)).astype(np.float32) for heads in (4, 2, 2)]


def rows():
    weights = np.tril(np.exp(np.random.default_rng(1).normal(size=(3, 4, 6, 6))))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def thirds(dtype):
    return (np.tril(np.ones((1, 1, 3, 3))) / np.arange(1, 4)[:, None]).astype(dtype)


WINDOWS = (None, 6, None)
FORM = {"softcap": 30.0, "slopes": (0.5, 0.25, 0.125, 0.0625)}


def sample(kind):
    if kind == "qkv":
        return Trace.from_qkv(*qkv(), windows=WINDOWS, **FORM, **TEXT)
    return Trace.from_attention(rows(), kv_heads=2, windows=WINDOWS, **TEXT)


def test_the_largest_numbers_are_numbers():
    shape = {"layers": 1, "steps": 1, "q_heads": 1, "kv_heads": 1, "head_dim": 1}
    scale, last = float(np.finfo(np.float64).max), [2**31 - 1]
    assert Meta(kind="qkv", **shape, scale=scale, tokens=last, positions=last).scale == scale


@pytest.mark.parametrize("kind", ["qkv", "attention"])
def test_layers(kind):
    trace = sample(kind)
    assert (trace.meta.kind, trace.meta.group, trace.meta.pieces) == (kind, 2, PIECES)
    assert trace.meta.scale == (8**-0.5 if kind == "qkv" else None)
    assert {name: getattr(trace.meta, name) for name in FORM} == (FORM if kind == "qkv" else dict.fromkeys(FORM))
    assert (trace.meta.windows, trace.meta.local) == (WINDOWS, (1,))
    assert [trace.part(layers=some).meta.windows for some in ([2, 1], [0, 2])] == [(None, 6), None]
    for index in (0, np.int64(2)):
        layer = trace.layer(index)
        assert type(layer) is {"qkv": QKV, "attention": Rows}[kind]
        for array, original in zip(layer, qkv() if kind == "qkv" else [rows()], strict=True):
            assert not array.flags.writeable
            np.testing.assert_array_equal(array, original[index])
    for index in (3, -1, 1.0, True, "1", None):
        with pytest.raises(TraceError, match=r"layer must be a whole number from 0 to 2, not"):
            trace.layer(index)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_any_float_dtype_becomes_float32(dtype):
    arrays = [array.astype(dtype) for array in qkv()]
    for array, original in zip(Trace.from_qkv(*arrays, scale=0.5).layer(2), arrays, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, original[2].astype(np.float32))
        assert np.shares_memory(array, original) == (dtype == np.float32)
        assert original.flags.writeable
    trace = Trace.from_attention(thirds(dtype))  # bfloat16 rounds each third up
    assert trace.meta.dtype == ("float32" if dtype == np.float64 else np.dtype(dtype).name)
    assert trace.meta.kv_heads == 1


def test_jax_arrays():
    trace = Trace.from_qkv(*map(jnp.asarray, qkv()), tokens=jnp.arange(6), pieces=np.array(PIECES))
    assert (trace.meta.tokens, trace.meta.pieces) == ((0, 1, 2, 3, 4, 5), PIECES)
    assert trace.meta.positions == (0, 1, 2, 3, 4, 5)


LIBRARIES = {
    "numpy": lambda x: x,
    "jax": jnp.asarray,
    "torch": lambda x: torch.tensor(x.astype(np.float64)).to(getattr(torch, x.dtype.name)),
    "torch with gradients": lambda x: LIBRARIES["torch"](x).requires_grad_() * 1,
}
PACKAGES = {
    "one array": lambda layers: layers,
    "one array with batch": lambda layers: layers[:, None],
    "tuple": tuple,
    "list": list,
    "tuple with batch": lambda layers: tuple(layer[None] for layer in layers),
}


@given(
    library=st.sampled_from([*LIBRARIES]),
    package=st.sampled_from([*PACKAGES]),
    dtype=st.sampled_from(["float32", "float64", "float16", "bfloat16"]),
    heads_first=st.booleans(),
    kind=st.sampled_from(["qkv", "attention"]),
)
def test_arrays_of_any_library_in_any_package(library, package, dtype, heads_first, kind):
    """The same numbers are read, or the order of the axes has to be given."""

    def given_as(x):
        with jax.enable_x64(dtype == "float64"):
            made = LIBRARIES[library](x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
            return PACKAGES[package](made)

    def rounded(x):
        return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)

    if kind == "attention":
        trace, expected = Trace.from_attention(given_as(rows()), kv_heads=2), [rows()]
        assert trace.meta.dtype == (dtype if dtype != "float64" else "float32")
    else:
        arrays, options = qkv(), {}
        if heads_first or "batch" in package:
            options = {"heads_first": heads_first}
        given_ = [given_as(x.swapaxes(1, 2) if heads_first else x) for x in arrays]
        if "batch" in package:
            with pytest.raises(
                TraceError, match=r"^q has a batch axis, .*: say heads_first=True if that is \[1, heads, "
            ):
                Trace.from_qkv(*given_)
        trace, expected = Trace.from_qkv(*given_, **options), arrays
    assert (trace.meta.layers, trace.meta.steps, trace.meta.q_heads, trace.meta.kv_heads) == (3, 6, 4, 2)
    for index in range(3):
        for array, original in zip(trace.layer(index), expected, strict=True):
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, rounded(original[index]))


def test_what_transformers_returns_otherwise():
    """None from sdpa, nothing without output_attentions, token by token from generate, and batches."""
    good = tuple(torch.tensor(rows()[:, None]))
    for none in (None, (), (None, None), [good[0], None]):
        with pytest.raises(
            TraceError, match="^the model returned no attentions: load it with attn_implementation='eager'"
        ):
            Trace.from_attention(none)
    with pytest.raises(
        TraceError, match=r"^layer 0 of probs is itself a tuple of arrays, as transformers' generate\(\)"
    ):
        Trace.from_attention((good, good))
    message = r"^layer 0 of probs holds a batch of 2 texts, a trace holds one: give layer\[row : row \+ 1\] of each$"
    with pytest.raises(TraceError, match=message):
        Trace.from_attention(tuple(torch.cat([layer, layer]) for layer in good))
    q, k, v = qkv()
    with pytest.raises(TraceError, match="^layer 1 of k holds a batch of 2 texts"):
        Trace.from_qkv(q, [k[0], np.stack([k[1], k[1]])], v)
    with pytest.raises(TraceError, match="^probs's dtype must be the same in all layers, not 'bfloat16 and float32'"):
        Trace.from_attention([good[0].bfloat16(), good[1]])
    with pytest.raises(TraceError, match=r"^layer 1: probs's shape must be \(4, 6, 6\), not \(4, 5, 5\)"):
        Trace.from_attention([rows()[0], rows()[1][:, :5, :5]])
    for strange in (torch.ones(2, device="meta"), torch.ones(3, 4, 6, 6).to_sparse(), {"attentions": good}, "rows"):
        with pytest.raises(TraceError, match="^probs(?! is None)"):
            Trace.from_attention(strange)


def test_numbers_of_any_library():
    q, k, v = qkv()
    trace = Trace.from_qkv(q, k, v, scale=jnp.float32(0.25), tokens=list(np.arange(6)), pieces=list(PIECES))
    assert (trace.meta.scale, trace.meta.tokens) == (0.25, (0, 1, 2, 3, 4, 5))
    assert {type(token) for token in trace.meta.tokens} == {int}
    assert Trace.from_attention(rows(), kv_heads=np.int64(2)).meta == Trace.from_attention(rows(), kv_heads=2).meta
    assert Trace.from_qkv(q, k, v, tokens=torch.arange(6)).meta.tokens == trace.meta.tokens
    with pytest.raises(TraceError, match="^scale must be a finite positive number"):
        Trace.from_qkv(q, k, v, scale=np.array([0.5, 0.5]))


def test_rows_rounded_to_bfloat16_from_end_to_end(tmp_path):
    """They miss a sum of 1 by more than 1e-3, and yet can be kept, replayed and held against bounds."""
    trace = Trace.from_attention(torch.tensor(rows()).bfloat16())
    sums = np.stack([trace.layer(layer).probs.sum(-1) for layer in range(3)])
    assert np.abs(sums - 1).max() > 1e-3
    trace.save(tmp_path / "trace")
    again = Trace.open(tmp_path / "trace")
    assert again.meta == trace.meta
    assert again.meta.dtype == "bfloat16"
    one, other = (replay(each, Corm(window=2, recent=1)) for each in (trace, again))
    np.testing.assert_array_equal(one.until, other.until)
    found = bounds(again, other)
    assert (found.policy <= found.most + 1e-6).all()
    np.testing.assert_allclose(replay(again, Full()).mass, 1, atol=1e-6)


def test_short_forms():
    assert repr(sample("qkv")) == (
        "Trace(kind='qkv', model='tiny', layers=3, steps=6, q_heads=4, kv_heads=2, head_dim=8, softcap=30.0, "
        "slopes=(0.5, 0.25, 0.125, 0.0625), local=(1,))"
    )
    assert repr(Trace.from_attention(rows())) == "Trace(kind='attention', layers=3, steps=6, q_heads=4, kv_heads=4)"
    long = Trace.from_qkv(*qkv(), model="m" * 10_000)
    assert len(repr(long)) < 150
    assert "tokens" not in repr(sample("qkv").meta)


@pytest.mark.parametrize("kind", ["qkv", "attention"])
def test_part(kind):
    whole = sample(kind)
    part = whole.part(layers=[2, 0], steps=4)
    assert (part.meta.layers, part.meta.steps) == (2, 4)
    assert (part.meta.pieces, part.meta.positions) == (PIECES[:4], (0, 1, 2, 3))
    for index, origin in enumerate((2, 0)):
        for array, original in zip(part.layer(index), whole.layer(origin), strict=True):
            np.testing.assert_array_equal(array, original[:4] if kind == "qkv" else original[:, :4, :4])
    assert part.part(layers=[1]).layer(0)[0].shape == part.layer(1)[0].shape
    assert whole.part().meta == whole.meta
    for wrong in ({"layers": [3]}, {"layers": [-1]}, {"steps": 7}, {"steps": 0}, {"steps": 2.0}):
        with pytest.raises(TraceError, match="(layer|steps) must be a whole number from"):
            whole.part(**wrong)
    with pytest.raises(TraceError, match="layers must be a whole number from 1"):
        whole.part(layers=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k, v[:, :5]), r"layer 0: v's shape must be '?\(6, 2, 8\)'?, not \(5, 2, 8\)"),
        (lambda q, k, v: (q, k[:2], v), "k's layers must be 3, not 2"),
        (
            lambda q, k, v: (q, k[:, :4], v),
            r"k's shape must be of 6 steps, as q's \(heads_first=True if heads come before",
        ),
        (lambda q, k, v: (q, k, [*v[:2], v[2, :, :1]]), r"layer 2: v's shape must be \(6, 2, 8\), not \(6, 1, 8\)"),
        (lambda q, k, v: ([], k, v), "q has no layers: give at least one"),
        (lambda q, k, v: (q[:, :, :3], k, v), "q_heads must be a multiple of kv_heads=2, not 3"),
        (lambda q, k, v: (q[0], k, v), "q's shape must be of 4 axes"),
        (lambda q, k, v: (q[:, :0], k[:, :0], v[:, :0]), "steps must be a whole number from 1"),
        (lambda q, k, v: (q, k, v.astype(complex)), "v's dtype must be a float, not 'complex128'"),
        (lambda q, k, v: (q, k, v.astype(int)), "v's dtype must be a float, not 'int64'"),
        (lambda q, k, v: (q, k, v + np.inf), "layer 0: v contains NaN or infinity"),
        (lambda q, k, v: (q, k, v.astype(float) * 1e300), "v has values beyond float32's .*: scale it down"),
        (lambda q, k, v: (q, k, None), "v must be an array of floats, not None"),
        (lambda q, k, v: (q, k, {"v": v}), "v must be an array of floats, not a dict"),
        (lambda q, k, v: (q, iter(k), v), "k must be an array of floats, not a"),
        (lambda q, k, v: (q, [[[1.0], [1.0, 2.0]]], v), "layer 0 of k is no array"),
    ],
)
def test_arrays_that_are_no_trace(change, message):
    with pytest.raises(TraceError, match=message):
        Trace.from_qkv(*change(*qkv()))


BROKEN_ROWS = [
    (lambda row: np.add(row, (2, -2, 0, 0, 0, 0)), "probs of head 2 must not be negative"),
    (lambda row: row + (row[1] + 0.01) * np.array([1, -1, 0, 0, 0, 0]), "probs of head 2 must not be negative"),
    (lambda row: np.roll(row, 2), "probs of head 2 must be causal: 0 for keys after the query"),
    (lambda row: np.roll(row, 1), "probs of head 2 must be causal: 0 for keys after the query"),
    (lambda row: row * 1.002, "probs of head 2, row 3, must sum to 1 within 0.001 for float32, not to 1.002"),
    (lambda row: row * np.nan, "probs contains NaN or infinity"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN_ROWS)
def test_rows_that_are_no_attention(change, message):
    probs = rows()
    probs[1, 2, 3] = change(probs[1, 2, 3])
    with pytest.raises(TraceError, match=f"^layer 1: {message}"):
        Trace.from_attention(probs)


GOOD = {"kind": "qkv", "layers": 3, "steps": 6, "q_heads": 4, "kv_heads": 2, "head_dim": 8}
BROKEN_META = [
    ({"kind": "mlp"}, "kind must be 'qkv' or 'attention', not 'mlp'"),
    ({"layers": 0}, "layers must be a whole number from 1 to 2147483647, not 0"),
    ({"layers": True}, "layers must be a whole number from 1 to 2147483647, not True"),
    ({"steps": 6.0}, "steps must be a whole number"),
    ({"steps": 2**31}, "steps must be a whole number"),
    ({"q_heads": "4"}, "q_heads must be a whole number"),
    ({"kv_heads": 3}, "q_heads must be a multiple of kv_heads=3, not 4"),
    ({"head_dim": None}, "head_dim must be a whole number"),
    ({"head_dim": 0, "scale": 1.0}, "head_dim must be a whole number"),
    ({"kind": "attention"}, "head_dim must be None in an attention trace, not 8"),
    ({"kind": "attention", "head_dim": None, "scale": 1.0}, "scale must be None in an attention trace"),
    ({"scale": 0.0}, "scale must be a finite positive number, not 0.0"),
    ({"scale": float("nan")}, "scale must be a finite positive number, not nan"),
    ({"scale": 10**400}, "scale must be a finite positive number"),
    ({"scale": True}, "scale must be a finite positive number, not True"),
    ({"scale": "0.5"}, "scale must be a finite positive number, not '0.5'"),
    ({"softcap": 0}, "softcap must be a finite positive number, not 0"),
    ({"slopes": [0.5, 0.25]}, r"len\(slopes\) must be q_heads=4, not 2"),
    ({"slopes": [0.5, 0.25, None, 1]}, r"slopes\[2\] must be a finite number, not None"),
    ({"slopes": 0.5}, "slopes must be a list with one entry a q_head, not 0.5"),
    ({"windows": [4]}, r"len\(windows\) must be layers=.*, not 1"),
    ({"windows": [None, 0, 4]}, r"windows\[1\] must be a whole number from 1 to 2147483647, not 0"),
    ({"windows": 4}, "windows must be a list with one entry a layer, not 4"),
    ({"kind": "attention", "head_dim": None, "softcap": 1.0}, "softcap must be None in an attention trace"),
    ({"model": None}, "model must be text"),
    ({"dtype": "float64"}, "dtype must be one of .*'bfloat16'.*, not 'float64'"),
    ({"dtype": ["float32"]}, "dtype must be one of"),
    ({"tokens": [1, 2]}, r"len\(tokens\) must be steps=6, not 2"),
    ({"tokens": "123456"}, "tokens must be a list"),
    ({"tokens": [1, 2, 3, 4, 5, -6]}, r"tokens\[5\] must be a whole number from 0"),
    ({"tokens": [1, True, 3, 4, 5, 6]}, r"tokens\[1\] must be a whole number from 0 .* not True"),
    ({"pieces": ["a"] * 5 + [7]}, r"pieces\[5\] must be text"),
    ({"pieces": ["a"] * 5 + ["\ud800"]}, r"pieces\[5\] must be text without lone surrogates"),
    ({"positions": [0, 1, 2, 2, 3, 4]}, "positions must be strictly increasing"),
    ({"positions": []}, r"len\(positions\) must be steps=6, not 0"),
]


@pytest.mark.parametrize(("changes", "message"), [*BROKEN_META, ({"pieces": [b"b"] * 6}, r"pieces\[0\] must be text")])
def test_meta_that_makes_no_sense(changes, message):
    with pytest.raises(TraceError, match=f"^{message}"):
        Meta(**{**GOOD, **changes})
