"""Pictures of the loss: every run is named, every readable CSV is read, nothing raw is printed."""

import pytest

HEADER = "epoch,train_loss,valid_loss,train_seconds,valid_seconds"
ROWS = ["0,,3.5,0,1", "1,3.1,2.5,10,1", "2,2.2,2.1,10,1"]


@pytest.fixture
def stats(tmp_path):
    """Write a statistics CSV; returns its path."""
    def write(name="s.csv", lines=(HEADER, *ROWS), end="\n", start=b""):
        path = tmp_path / name
        path.write_bytes(start + "".join(line + end for line in lines).encode())
        return path
    return write


@pytest.fixture
def read():
    from tests.small import load_stage

    return load_stage("plot_loss").read


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_several_runs_are_drawn(stats, tmp_path, stage, suffix, start):
    out = tmp_path / f"a.{suffix}"
    result = stage("plot_loss", stats(), stats("t.csv"), "-x", "seconds", "--label", "one", "two", "--log", "-o", out)
    assert (result.code, result.err, result.out) == (0, "", f"{out}: 2 runs drawn against seconds\n")
    assert out.read_bytes().startswith(start)


@pytest.mark.parametrize("label", ["_mine", "__", "a$x^{$", "$_$", "_$", "plain", "x" * 40])
def test_every_name_stands_in_the_legend(stats, tmp_path, stage, label):
    out = tmp_path / "a.svg"
    result = stage("plot_loss", stats(f"{label}.csv"), "-o", out)
    assert result.code == 0 and result.err == ""
    assert f"{label}, validation" in out.read_text().replace("\\$", "$") and f"{label}, training" in out.read_text(
        ).replace("\\$", "$")


def test_a_name_that_the_font_lacks_is_told_in_one_line(stats, tmp_path, stage, recwarn):
    out = tmp_path / "a.png"
    result = stage("plot_loss", stats("日本.csv"), "-o", out)
    assert result.err == f"{out}: the font lacks some characters of the names; they are drawn as boxes\n"
    assert result.code == 0 and not recwarn.list


def test_many_long_names_and_control_characters_fit(stats, tmp_path, stage, recwarn):
    paths = [stats(f"{i}{'long' * 30}.csv") for i in range(30)]
    labels = ["a\nb\x1b[31m", *(p.stem for p in paths[1:])]
    result = stage("plot_loss", *paths, "--label", *labels, "-o", tmp_path / "a.png")
    assert (result.code, result.err) == (0, "") and not recwarn.list


@pytest.mark.parametrize("rows", [["0,,0,0,0", "1,0,0,1,1"], ["0,,-1,0,0"], ["0,,0,0,0", "1,2.5,-3,1,1"]])
def test_log_needs_a_loss_above_0(stats, tmp_path, stage, rows):
    good, bad = stats(), stats("bad.csv", [HEADER, *rows])
    result = stage("plot_loss", good, bad, "--log", "-o", tmp_path / "a.png")
    assert (result.code, result.err) == (
        2, f"plot_loss.py: error: {bad}: has no validation loss above 0, which --log needs\n")
    assert not (tmp_path / "a.png").exists()
    assert stage("plot_loss", good, bad, "-o", tmp_path / "a.png").code == 0


@pytest.mark.parametrize(("lines", "end", "start"), [
    ([HEADER, "", *ROWS, "", ""], "\n", b""), ([HEADER, ROWS[0], "  ", ROWS[1], ",,,,", ROWS[2]], "\r\n", b""),
    ([HEADER, *ROWS], "\r\n", b"\xef\xbb\xbf"), (["", HEADER, *ROWS], "\n", b"\xef\xbb\xbf"),
    ([HEADER + ",more", *(row + ",9" for row in ROWS)], "\n", b"")])
def test_a_csv_that_a_spreadsheet_saved_reads_like_the_original(stats, read, lines, end, start):
    expected = {"epoch": (0, 1, 2), "valid_loss": (3.5, 2.5, 2.1), "train_seconds": (0, 10, 10)}
    found = read(stats(lines=lines, end=end, start=start))
    assert {k: found[k] for k in expected} == expected and found["train_loss"][1:] == (3.1, 2.2)


@pytest.mark.parametrize(("lines", "complaint"), [
    ([HEADER, ROWS[0], "", "1,,nan,1,1"], "line 4: epoch, valid_loss and train_seconds must be finite numbers"),
    ([HEADER, "1e308,,1,1,1"], "line 2: epoch, valid_loss and train_seconds must be finite numbers"),
    ([HEADER], "holds no complete row of statistics"), ([HEADER, "1,2,3"], "holds no complete row of statistics"),
    ([HEADER, "1,a,3,4,5"], "is not a statistics file: could not convert string to float: 'a'"),
    ([""], f"is not a statistics file; its first columns must be {HEADER}"),
    ([HEADER.replace(",", ";")], f"is not a statistics file; its first columns must be {HEADER}")])
def test_what_is_no_statistics_file_is_refused(stats, tmp_path, stage, lines, complaint):
    path = stats(lines=lines)
    result = stage("plot_loss", path, "-o", tmp_path / "a.png")
    assert (result.code, result.err) == (2, f"plot_loss.py: error: {path}: {complaint}\n")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--label", "a", "b"], "--label names 2 of 1 files"),
    (["-o", "a.jpg"], "a.jpg: the picture's name must end in .png, .pdf or .svg"),
    (["-o", "png"], "png: the picture's name must end in .png, .pdf or .svg")])
def test_usage_errors(stats, stage, arguments, complaint):
    result = stage("plot_loss", stats(), *arguments)
    assert (result.code, result.err) == (2, f"plot_loss.py: error: {complaint}\n")


def test_a_missing_file_is_named(tmp_path, stage):
    result = stage("plot_loss", tmp_path / "none.csv", "-o", tmp_path / "a.png")
    assert (result.code, result.err) == (2, f"plot_loss.py: error: {tmp_path / 'none.csv'}: no such file\n")


def test_it_has_these_flags_only(stage):
    from tests.small import load_stage

    parser = load_stage("plot_loss").build_parser()
    assert [a.option_strings for a in parser._actions][1:] == [[], ["-x"], ["--label"], ["--log"], ["-o", "--output"]]
