"""What commands write: nothing that exists is replaced, no result is lost, nothing is left half written."""

import errno
import json
import os
import stat
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest

from corm_jax import CormError, files
from corm_jax.files import check_new, check_writable, deliver, finish, whole_file, write_json
from simulator.synthetic import noise


def save(words, path):
    Path(path).write_text(words)


@pytest.fixture
def elsewhere(tmp_path_factory, monkeypatch):
    """Where results are kept that cannot be put into their place."""
    folder = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def full(monkeypatch):
    """Makes the disk under a folder full: what is written there never arrives."""
    disks, sync = [], os.fsync

    def fsync(number):
        path = os.path.realpath(f"/proc/self/fd/{number}").removesuffix(" (deleted)")
        if any(path.startswith(f"{disk}/") for disk in disks):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    monkeypatch.setattr("corm_jax.files.os.fsync", fsync)
    return disks.append


def test_a_file_that_exists_is_replaced_only_if_asked_for(tmp_path):
    there = tmp_path / "there"
    there.write_text("before")
    for path in (there, tmp_path / "link"):
        if path != there:
            path.symlink_to(there)
        with pytest.raises(CormError, match=f"--json {path} exists already: .* add --overwrite"):
            check_new({"--plot": None, "--json": path}, overwrite=False)
        check_new({"--json": path}, overwrite=True)
    deliver(tmp_path / "link", partial(save, "after"), overwrite=True)
    assert (tmp_path / "link").is_symlink()  # a link stays one
    assert there.read_text() == "after"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "new")
    with pytest.raises(CormError, match="exists already"):
        check_new({"--json": dangling}, overwrite=False)
    deliver(dangling, partial(save, "new"), overwrite=True)
    assert (tmp_path / "new").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "new", "there"]


def test_two_outputs_need_two_names(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for other in ("a", "../" + tmp_path.name + "/a", "link"):
        with pytest.raises(CormError, match="--json and --plot name the same file"):
            check_new({"--json": tmp_path / "a", "--plot": tmp_path / other}, overwrite=True)


def test_places_where_nothing_can_be_written(tmp_path, full):
    (tmp_path / "file").touch()
    for path, message in {
        tmp_path: "it is a directory",
        tmp_path / "none" / "a": "there is no directory",
        tmp_path / "file" / "a": "there is no directory",
        tmp_path / ("x" * 300): "File name too long",
        Path("/proc/a"): "No such file",
    }.items():
        with pytest.raises(CormError, match=message):
            check_writable(path)
        with pytest.raises(CormError, match=f"--out: cannot write.*{message}"):
            check_new({"--out": path}, overwrite=True)
    check_writable(tmp_path / ("x" * 255))
    full(tmp_path)
    with pytest.raises(CormError, match="No space left on device: 1 MiB must be free"):
        check_writable(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_limit_on_the_size_of_files_counts_as_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CormError, match="File too large: 1 MiB must be free"):
            check_writable(tmp_path / "a")
        with pytest.raises(CormError, match="cannot write .*: File too large, nor anywhere else"):
            deliver(tmp_path / "a", partial(save, "x" * 2000), overwrite=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(tmp_path.iterdir())


def vanishes(folder):
    folder.rmdir()
    return "No such file or directory"


def becomes_a_directory(folder):
    (folder / "a").mkdir()
    return "(directory|something has appeared there meanwhile)"


def appears(folder):
    (folder / "a").write_text("somebody else's")
    return "something has appeared there meanwhile"


@pytest.mark.parametrize("happens", [vanishes, becomes_a_directory, appears])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_result_whose_place_has_become_unusable_is_kept(tmp_path, elsewhere, happens, overwrite):
    folder = tmp_path / "folder"
    folder.mkdir()
    check_new({"--json": folder / "a"}, overwrite=overwrite)
    message = happens(folder)
    if overwrite and happens is appears:
        deliver(folder / "a", partial(save, "result"), overwrite=True)
        assert (folder / "a").read_text() == "result"
        return
    with pytest.raises(CormError, match=f"cannot write {folder}/a: .*{message}.*: the result is in ") as raised:
        deliver(folder / "a", partial(save, "result"), overwrite=overwrite)
    kept = Path(str(raised.value).rpartition(" is in ")[2])
    assert kept.is_relative_to(elsewhere)
    assert kept.read_text() == "result"
    if happens is appears:
        assert (folder / "a").read_text() == "somebody else's"
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".corm")]


def test_a_disk_that_is_full_at_the_end(tmp_path, elsewhere, full):
    (tmp_path / "a").write_text("before")
    check_new({"--json": tmp_path / "a"}, overwrite=True)
    full(tmp_path)
    with pytest.raises(CormError, match="No space left on device: the result is in ") as raised:
        deliver(tmp_path / "a", lambda path: write_json(path, {"x": 1}), overwrite=True)
    assert json.loads(Path(str(raised.value).rpartition(" is in ")[2]).read_text()) == {"x": 1}
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_nowhere_to_keep_it(tmp_path, monkeypatch):
    def fails(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(CormError, match="No space left on device, nor anywhere else: make room"):
        deliver(tmp_path / "a", fails, overwrite=False)
    assert not any(tmp_path.iterdir())


def test_every_step_is_taken_and_every_error_is_told():
    taken = []

    def step(number, error=None):
        taken.append(number)
        if error:
            raise error

    with pytest.raises(CormError, match=r"^one; three$"):
        finish(
            partial(step, 1, CormError("one")),
            partial(step, 2, BrokenPipeError()),
            partial(step, 3, CormError("three")),
        )
    with pytest.raises(BrokenPipeError):
        finish(partial(step, 4), partial(step, 5, BrokenPipeError()), partial(step, 6))
    with pytest.raises(ZeroDivisionError):  # a bug shows as one
        finish(partial(step, 7, CormError("seven")), partial(step, 8, ZeroDivisionError()))
    assert taken == [1, 2, 3, 4, 5, 6, 7, 8]


def test_devices_pipes_and_open_files_are_written_to(tmp_path, capfdbinary):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/stdout"), Path("/dev/null"), Path("/dev/fd/1")):
        check_new({"--json": path}, overwrite=False)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    deliver(pipe, partial(save, "into the pipe"), overwrite=False)
    reader.join()
    assert read == [b"into the pipe"]
    print("before")
    deliver(Path("/dev/stdout"), partial(save, "to the output\n"), overwrite=False)
    deliver(Path("/dev/fd/1"), partial(save, "again\n"), overwrite=False)
    assert capfdbinary.readouterr().out == b"before\nto the output\nagain\n"
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_device_that_is_full(elsewhere):
    with pytest.raises(CormError, match="cannot write /dev/full: No space left on device: the result is in ") as raised:
        deliver(Path("/dev/full"), partial(save, "kept"), overwrite=False)
    assert Path(str(raised.value).rpartition(" is in ")[2]).read_text() == "kept"


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("x" * 255)
    check_new({"--json": path}, overwrite=False)
    write_json(path, {})
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_file_systems_without_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", link)
    deliver(tmp_path / "a", partial(save, "first"), overwrite=False)
    assert (tmp_path / "a").read_text() == "first"
    with pytest.raises(FileExistsError), whole_file(tmp_path / "a", replace=False) as temporary:
        temporary.write_text("second")
    assert (tmp_path / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def umask():
    """Another umask than is usual, under which new files have the mode 0640."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("replaced", [False, True])
def test_the_umask_decides_who_can_read_a_file(umask, tmp_path, replaced):
    """Also where the one who writes it asks for a mode of 0600, as safetensors does."""

    def secretive(path):
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(b"words")
        Path(file.name).replace(path)

    for write in (partial(save, "words"), secretive):
        if replaced:
            (tmp_path / "a").touch(0o600)
        deliver(tmp_path / "a", write, overwrite=True)
        assert (tmp_path / "a").read_text() == "words"
        assert oct((tmp_path / "a").stat().st_mode & 0o777) == "0o640"
        (tmp_path / "a").unlink()


def test_all_files_of_a_trace_have_one_mode(umask, tmp_path):
    noise(layers=2, steps=4).save(tmp_path / "trace")
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "trace").iterdir()}
    assert modes == dict.fromkeys(["layer-000.safetensors", "layer-001.safetensors", "meta.json"], "0o640")
    assert oct((tmp_path / "trace").stat().st_mode & 0o777) == "0o750"


def test_what_an_interrupted_block_wrote_is_removed(tmp_path):
    (tmp_path / "a").write_text("before")

    def interrupted():
        with whole_file(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
