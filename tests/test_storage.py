"""Traces on disk: what is written is read, a recording goes on where it stopped, and no bytes surprise the reader."""

import errno
import hashlib
import json
import os
import shutil
import struct
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from corm_jax.traces.arrays import TraceError
from corm_jax.traces.storage import Writer
from corm_jax.traces.trace import Trace
from tests.test_trace import BROKEN_META, BROKEN_ROWS, TEXT, qkv, rows, sample, thirds

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FIRST = "layer-000.safetensors"


def edit(change):
    def damage(path):
        content = json.loads((path / "meta.json").read_text())
        change(content)
        (path / "meta.json").write_text(json.dumps(content))

    return damage


def reseal(path, index=0):
    """States the size and checksum that a layer's file has now: damage that someone meant."""
    data = (path / f"layer-{index:03d}.safetensors").read_bytes()
    edit(lambda c: c["files"][index].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))(path)


def read_all(path):
    trace = Trace.open(path)
    layers = [trace.layer(index) for index in range(trace.meta.layers)]
    for layer in layers:
        assert {name: array.shape for name, array in layer._asdict().items()} == trace.meta.shapes
        assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in layer)
    return trace, layers


def record(path, stop=None, meta=None, **how):
    """Writes the sample; stops before layer `stop`. Returns the layers that were already done."""
    trace = sample("qkv")
    with Writer(path, meta or trace.meta, **how) as writer:
        done = writer.done
        for index in range(done, trace.meta.layers):
            if index == stop:
                raise KeyboardInterrupt
            writer.write(**trace.layer(index)._asdict())
    return done


@pytest.fixture(params=["qkv", "attention"])
def path(request, tmp_path):
    sample(request.param).save(tmp_path / "trace")
    return tmp_path / "trace"


@pytest.fixture
def half(tmp_path):
    """A recording that stopped after two of three layers."""
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "trace", stop=2)
    return tmp_path / ".trace.part"


# What is written is what is read.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["qkv", "attention"])
def test_round_trip(tmp_path, kind, dtype):
    trace = sample(kind)
    trace.save(tmp_path / "trace", dtype)
    found, layers = read_all(tmp_path / "trace")
    assert found.meta == replace(trace.meta, dtype=dtype)
    for index, layer in enumerate(layers):
        assert type(layer) is type(trace.layer(index))
        for array, original in zip(layer, trace.layer(index), strict=True):
            assert array.dtype == np.float32
            assert not array.flags.writeable
            np.testing.assert_array_equal(array, original.astype(DTYPES[dtype]).astype(np.float32))
    names = {"meta.json", *(f"layer-00{index}.safetensors" for index in range(3))}
    assert {file.name for file in (tmp_path / "trace").iterdir()} == names
    assert [file.name for file in tmp_path.iterdir()] == ["trace"]
    found.part(layers=[2, 0], steps=4).save(tmp_path / "part", dtype)
    for array, original in zip(read_all(tmp_path / "part")[1][1], layers[0], strict=True):
        np.testing.assert_array_equal(array, original[:4] if kind == "qkv" else original[:, :4, :4])


def test_the_layers_are_safetensors_like_any_other(path):
    found, expected = load_file(path / FIRST), Trace.open(path).layer(0)._asdict()
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    save_file(found, path / FIRST, metadata={"by": "another program"})
    reseal(path)
    assert len(read_all(path)[1]) == 3


def test_16_bit_dtypes_are_not_mistaken_for_each_other(tmp_path):
    sample("qkv").save(tmp_path / "trace", "bfloat16")
    with safe_open(tmp_path / "trace" / FIRST, "numpy") as file:
        assert file.get_slice("q").get_dtype() == "BF16"
    edit(lambda content: content.update(dtype="float16"))(tmp_path / "trace")  # every size stays as it was
    with pytest.raises(TraceError, match="header must be .*F16"):
        Trace.open(tmp_path / "trace").layer(0)


def test_rows_of_16_bits_stay_in_16_bits(tmp_path):
    trace = Trace.from_attention(thirds(ml_dtypes.bfloat16))
    trace.save(tmp_path / "same")
    assert read_all(tmp_path / "same")[1][0].probs[0, 2].sum() > 1.0015
    with pytest.raises(TraceError, match="head 0, row 2, .* for float32, not to 1.00195.* have to stay in their dtype"):
        trace.save(tmp_path / "other", "float32")
    weights = np.tril(np.full((1, 1, 1500, 1500), 2e-8)) + np.eye(1500)  # all but one a row are rounded to zero
    Trace.from_attention(weights / weights.sum(-1, keepdims=True)).save(tmp_path / "small", "float16")
    assert len(read_all(tmp_path / "small")[1]) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "cannot be used: .*No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is damaged"),
    ],
)
def test_layers_are_read_when_asked_for(path, damage, message):
    trace = Trace.open(path)
    part = trace.part(layers=[1, 0])
    damage(path / FIRST)
    assert len(trace.layer(2)) == len(part.layer(0))
    with pytest.raises(TraceError, match=f"{FIRST} {message}"):
        part.layer(1)


# A recording goes on where it stopped.


def test_resume_after_an_exception(tmp_path, half):
    first = (half / "layer-001.safetensors").stat().st_mtime_ns
    shutil.copytree(half, tmp_path / "copy")
    for name in ("trace", ".trace.part", "copy"):
        with pytest.raises(TraceError, match=f"{name} is half-written: run the same recording again"):
            Trace.open(tmp_path / name)
    assert record(tmp_path / "trace") == 2
    assert (tmp_path / "trace/layer-001.safetensors").stat().st_mtime_ns == first
    for index, layer in enumerate(read_all(tmp_path / "trace")[1]):
        np.testing.assert_array_equal(layer.q, qkv()[0][index])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy", "trace"]


def test_resume_after_a_kill(tmp_path, half):
    (half / "hidden.safetensors").write_bytes(b"the recorder's own")
    # What a kill can leave: a file not yet renamed; layers beyond a gap.
    (half / ".layer-002.safetensors.1.part").write_bytes(b"half")
    (half / "layer-001.safetensors").replace(half / "layer-002.safetensors")
    again = Writer(tmp_path / "trace", sample("qkv").meta)
    assert (again.done, again.folder) == (1, half)
    assert sorted(p.name for p in half.iterdir()) == ["hidden.safetensors", "layer-000.safetensors", "meta.part.json"]
    assert record(tmp_path / "trace") == 1
    assert not (tmp_path / "trace/hidden.safetensors").exists()
    assert len(read_all(tmp_path / "trace")[1]) == 3


def test_resume_after_a_kill_at_the_very_end(tmp_path, half):
    unfinished = (half / "meta.part.json").read_bytes()
    record(tmp_path / "trace")
    finished = (tmp_path / "trace/meta.json").read_bytes()
    (tmp_path / "trace/meta.part.json").write_bytes(unfinished)
    assert len(read_all(tmp_path / "trace")[1]) == 3  # after the rename
    (tmp_path / "trace").rename(half)  # before the rename
    assert record(tmp_path / "trace") == 3
    assert (tmp_path / "trace/meta.json").read_bytes() == finished


@pytest.mark.parametrize(
    ("damage", "changes"),
    [
        (lambda half: None, {"model": "another"}),
        (lambda half: (half / "meta.part.json").write_text("{"), {}),
        (lambda half: (half / "meta.part.json").unlink(), {}),
        (lambda half: save_file({"q": np.zeros(96 * 4, np.float32)}, half / FIRST), {}),
    ],
)
def test_starting_over(tmp_path, half, damage, changes):
    damage(half)
    meta = replace(sample("qkv").meta, **changes)
    assert record(tmp_path / "trace", meta=meta) == 0
    assert Trace.open(tmp_path / "trace").meta == meta


def test_saving_does_not_resume(tmp_path, half):
    q, k, v = qkv()
    Trace.from_qkv(2 * q, k, v, **TEXT).save(tmp_path / "trace")
    np.testing.assert_array_equal(Trace.open(tmp_path / "trace").layer(0).q, 2 * q[0])
    with pytest.raises(KeyboardInterrupt):
        record(tmp_path / "another", stop=2)
    assert record(tmp_path / "another", resume=False) == 0


def test_too_few_and_too_many_layers(tmp_path, half):
    trace = sample("qkv")
    with pytest.raises(TraceError, match="2 of 3 layers were written"), Writer(tmp_path / "trace", trace.meta):
        pass
    with Writer(tmp_path / "trace", trace.meta) as writer:
        writer.write(**trace.layer(2)._asdict())
        with pytest.raises(TraceError, match="layer must be below layers=3, not 3"):
            writer.write(**trace.layer(2)._asdict())


def refuses(**_):
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "exists already: choose another name or delete it") for name in ("file", "link", ".")),
        ("none/trace", "there is no directory"),
        ("x" * 300, "cannot be used: .*File name too long"),
        ("trace", "cannot be used: .*Not a directory"),
        ("other", "Permission denied"),
    ],
)
def test_where_nothing_can_be_written(tmp_path, monkeypatch, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / ".trace.part").touch()
    if name == "other":
        monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    with pytest.raises(TraceError, match=message):
        Writer(tmp_path / name, sample("qkv").meta)


def test_a_name_taken_meanwhile(tmp_path, half):
    writer = Writer(tmp_path / "trace", sample("qkv").meta)
    q, k, v = (array[2] for array in qkv())
    writer.write(q=q, k=k, v=v)
    assert q.flags.writeable  # still the caller's
    (tmp_path / "trace").mkdir()
    with pytest.raises(TraceError, match="exists already"):
        writer.__exit__(None, None, None)
    (tmp_path / "trace").rmdir()
    assert record(tmp_path / "trace") == 3


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(TraceError, match=f"{FIRST} cannot be used: No space left"):
        sample("qkv").save(tmp_path / "trace")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: {"q": q, "k": k}, "must be q and k and v, not 'q and k'"),
        (lambda q, k, v: {"probs": q}, "must be q and k and v, not 'probs'"),
        (lambda q, k, v: {"q": q, "k": k, "v": q}, r"v's shape must be '?\(6, 2, 8\)'?, not \(6, 4, 8\)"),
        (lambda q, k, v: {"q": q * 1e5, "k": k, "v": v}, "q has values beyond float16's .*: store it as 'bfloat16'"),
    ],
)
def test_wrong_tensors(tmp_path, change, message):
    q, k, v = (array[0] for array in qkv())
    with Writer(tmp_path / "trace", replace(sample("qkv").part(layers=[0]).meta, dtype="float16")) as writer:
        with pytest.raises(TraceError, match=f"^layer 0:? {message}"):
            writer.write(**change(q, k, v))
        writer.write(q=q, k=k, v=v)


# Directories that are no trace.


@pytest.mark.parametrize("name", ["none", "file", ".", "\0"])
def test_no_trace(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(TraceError, match="is no trace: it is not a directory with a meta.json"):
        Trace.open(tmp_path / name)


def test_the_system_refuses(path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    trace = Trace.open(path)
    with pytest.raises(TraceError, match="cannot be used: .*too long"):
        Trace.open(path / ("x" * 300))
    monkeypatch.setattr(Path, "open", refuse)
    for read in (lambda: trace.layer(0), lambda: Trace.open(path)):
        with pytest.raises(TraceError, match="cannot be used: .*Permission denied"):
            read()


def meta(content):
    return lambda path: (path / "meta.json").write_bytes(content)


def layer(change, seal=True):
    def damage(path):
        (path / FIRST).write_bytes(change((path / FIRST).read_bytes()))
        if seal:
            reseal(path)

    return damage


def header(text):
    return layer(lambda c: struct.pack("<Q", len(text)) + text + c[8 + struct.unpack("<Q", c[:8])[0] :])


def instead(name, put):
    """Something else in the place of a file, which moves out of the directory."""
    return lambda path: ((path / name).replace(path.with_name("outside")), put(path / name))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((meta(content), "cannot be read as JSON") for content in (b"", b"{")),
        (meta(b"\xff\xfe{\x00}\x00"), "cannot be read as JSON: 'utf-8' codec"),
        *((meta(text * 100_000), "cannot be read as JSON: .*recursion") for text in (b"[", b'{"a":')),
        (meta(b'{"steps": ' + b"9" * 5000 + b"}"), "cannot be read as JSON: Exceeds the limit"),
        (meta(b'{"scale": NaN}'), "cannot be read as JSON: NaN is no number"),
        (meta(b'{"scale": -Infinity}'), "cannot be read as JSON: -Infinity is no number"),
        (meta(b'{"format": "corm-trace", "format": "corm-trace"}'), "cannot be read as JSON: a field appears twice"),
        (meta(b"[]"), r"meta.json must be a JSON object, not \[\]"),
        (meta(b"{}"), "meta.json: format must be 'corm-trace', not None"),
        (meta(b'{"format": "corm-trace", "version": 1}'), "version must be 2 for this corm-jax, not 1"),
        (meta(b'{"format": "corm-trace", "version": true}'), "version must be 2"),
        (meta(b'{"format": "corm-trace", "version": 2}'), "fields .* are missing or unknown"),
        (lambda path: os.truncate(path / "meta.json", 257 * 2**20), "size must be at most 268435456 bytes, not 26948"),
        (instead("meta.json", Path.mkdir), "meta.json must be a regular file"),
        (edit(lambda c: c.pop("tokens")), r"fields \['tokens'\] are missing or unknown"),
        (edit(lambda c: c.update(colour=1)), r"fields \['colour'\] are missing or unknown"),
        (edit(lambda c: c.update(positions=None, steps=2**31 - 1)), "positions must be stated, not None"),
        (edit(lambda c: c.update(steps=5)), r"len\(tokens\) must be steps=5, not 6"),
        (edit(lambda c: c.update(layers=10**9, windows=None)), "files must be a list of 1000000000, not"),
        (edit(lambda c: c.pop("files")), "files must be a list of 3, not None"),
        (edit(lambda c: c["files"].pop()), "files must be a list of 3, not"),
        (edit(lambda c: c["files"].insert(1, 7) or c["files"].pop()), r"files\[1\] must be an object of .*, not 7"),
        (edit(lambda c: c["files"][1].pop("bytes")), r"files\[1\] must be an object"),
        (edit(lambda c: c["files"][0].update(name="../x")), rf"files\[0\].name must be '{FIRST}', not '../x'"),
        (edit(lambda c: c["files"][1].update(name=FIRST)), r"files\[1\].name must be"),
        (edit(lambda c: c["files"][1].update(bytes=10**12)), r"files\[1\].bytes must be \d+, not 1000000000000"),
        (edit(lambda c: c["files"][1].update(bytes="9")), r"files\[1\].bytes must be"),
        (edit(lambda c: c["files"][1].update(sha256=3)), r"files\[1\].sha256 must be 64 digits, not 3"),
        (lambda path: (path / FIRST).unlink(), f"lacks {FIRST}: record or copy the trace again"),
        (instead(FIRST, lambda file: file.symlink_to("../outside")), f"{FIRST} must be a regular file, not a link"),
        (instead(FIRST, lambda file: file.symlink_to("layer-001.safetensors")), "must be a regular file, not a link"),
        (instead(FIRST, lambda file: file.symlink_to("nowhere")), "must be a regular file, not a link"),
        (instead(FIRST, Path.mkdir), "must be a regular file"),
        (layer(lambda c: c[:-1], seal=False), r"files\[0\].bytes must be"),
        (layer(lambda c: c + b"\0", seal=False), r"files\[0\].bytes must be"),
        (layer(lambda c: b"", seal=False), r"files\[0\].bytes must be"),
        (layer(lambda c: c[:-1] + bytes([c[-1] ^ 1]), seal=False), f"{FIRST} is damaged: its sha256 is not"),
        (lambda path: shutil.copy(path / "layer-001.safetensors", path / FIRST), "is damaged: its sha256 is not"),
        (layer(lambda c: c + bytes(5000)), f"{FIRST} has .* bytes: a layer of these shapes takes"),
        (layer(lambda c: struct.pack("<Q", 2**63) + c[8:]), f"{FIRST}: header length must be"),
        (layer(lambda c: struct.pack("<Q", 0) + c[8:]), "header length must be"),
        (layer(lambda c: b"not safetensors" + c[15:]), "header length must be"),
        (header(b"[" * 200), f"{FIRST} cannot be read as JSON"),
        (header(b"{}"), f"{FIRST}: header must be"),
        (header(b'{"q": {"dtype": "F32", "shape": [6, 4, 8], "data_offsets": [0, %d]}}' % (10**18)), "header must be"),
        (header(b'{"q": 3, "k": [], "v": null}'), "header must be"),
        (layer(lambda c: c[:-4] + np.float32(np.nan).tobytes()), f"{FIRST}: (v|probs) contains NaN or infinity"),
        (layer(lambda c: c[:-4] + np.float32(np.inf).tobytes()), f"{FIRST}: (v|probs) contains NaN or infinity"),
    ],
)
def test_damage(path, damage, message):
    damage(path)
    with pytest.raises(TraceError, match=message):
        read_all(path)


@pytest.mark.parametrize("path", ["qkv"], indirect=True)
@pytest.mark.parametrize("changes", [{"scale": None}, {"head_dim": 16}, *(changes for changes, _ in BROKEN_META)])
def test_meta_json_that_makes_no_sense(path, changes):
    edit(lambda content: content.update(changes))(path)
    message = "takes .* and a header" if changes == {"head_dim": 16} else "meta.json(: | cannot be read as JSON: NaN)"
    with pytest.raises(TraceError, match=message):
        Trace.open(path)


@pytest.mark.parametrize(("change", "message"), BROKEN_ROWS)
@pytest.mark.parametrize("path", ["attention"], indirect=True)
def test_rows_that_are_no_attention(path, change, message):
    probs = rows()
    probs[1, 2, 3] = change(probs[1, 2, 3])
    save_file({"probs": probs[1]}, path / "layer-001.safetensors")
    reseal(path, 1)
    with pytest.raises(TraceError, match=f"layer-001.safetensors: {message}"):
        Trace.open(path).layer(1)
    writer = Writer(path.with_name("new"), sample("attention").meta)
    writer.write(probs=probs[0])
    with pytest.raises(TraceError, match=f"layer 1: {message}"):
        writer.write(probs=probs[1])


# Whatever the bytes are.

ODD = [None, True, -1, 0, 1, 2, 3, 7, 2**31, 10**30, 10**400, 0.5, -0.0, "", "float16", "\ud800", "../x", [], {}, [[]]]


def corrupt(rng, path):
    """One random change to a trace's directory."""
    target, other = rng.choice(sorted(path.iterdir()), 2)
    content = target.read_bytes()
    at = int(rng.integers(len(content)))
    changed = {
        "flip": content[:at] + bytes([content[at] ^ 1 << rng.integers(8)]) + content[at + 1 :],
        "truncate": content[:at],
        "extend": content + rng.bytes(rng.integers(1, 100)),
        "zero": content[:at] + bytes(len(content[at : at + 64])) + content[at + 64 :],
        "swap": other.read_bytes(),
    }
    how = rng.choice([*changed, "delete", "edit", "edit", "edit"])
    if how == "edit":
        edit(lambda meta: change_json(rng, meta))(path)
    elif how == "delete":
        target.unlink()
    else:
        target.write_bytes(changed[how])
        if how == "swap":
            other.write_bytes(content)


def change_json(rng, node):
    """Replaces, removes or adds something at a random place of a JSON value."""
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else int(rng.integers(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.3:
            break
        node = node[key]
    how = rng.random()
    if how < 0.1:
        del node[key]
    elif how < 0.2 and isinstance(node, dict):
        node[f"{key}_"] = node[key]
    else:
        value = ODD[rng.integers(len(ODD))]
        for _ in range(300 if how > 0.95 else 0):
            value = [value]
        node[key] = value


@pytest.mark.parametrize("kind", ["qkv", "attention"])
def test_fuzz(tmp_path, kind):
    path, rng, refused = tmp_path / "trace", np.random.default_rng(2), []
    sample(kind).part(layers=[0, 1], steps=3).save(path, "float32" if kind == "qkv" else "bfloat16")
    good = {file: file.read_bytes() for file in path.iterdir()}
    tracemalloc.start()
    try:
        for _ in range(300):
            for file, content in good.items():
                file.write_bytes(content)
            corrupt(rng, path)
            try:
                read_all(path)
            except TraceError as error:
                refused.append(str(error))
            else:
                assert all(file.read_bytes() == good[file] for file in good if file.name != "meta.json")
        assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    finally:
        tracemalloc.stop()
    assert 150 < len(refused) < 291
    assert max(map(len, refused)) < 2000


@pytest.mark.parametrize("kind", ["qkv", "attention"])
def test_fuzz_under_a_right_checksum(tmp_path, kind):
    """The header and the values are looked at, not only the checksum."""
    sample(kind).part(layers=[0], steps=3).save(tmp_path / "trace", "float16")
    file, rng = tmp_path / "trace" / FIRST, np.random.default_rng(3)
    good = file.read_bytes()
    for _ in range(300):
        content = bytearray(good)
        for index in rng.integers(len(content) if rng.random() < 0.5 else 90, size=2):
            content[index] = rng.integers(256)
        file.write_bytes(content)
        reseal(tmp_path / "trace")
        with suppress(TraceError):
            read_all(tmp_path / "trace")
