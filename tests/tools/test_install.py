"""Installation: what tools/install.py would run, and the metadata in setup.py. No network."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.repository import ROOT

SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"


def load_install():
    """tools/install.py as a module; tools/ is not a package."""
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def install(monkeypatch):
    """A tools/install.py that cannot start a process."""
    module = load_install()

    def refuse(*args, **kwargs):
        raise AssertionError("a dry run must not install")

    monkeypatch.setattr(module.subprocess, "call", refuse)
    # Whatever this machine's pip is told and has for uv.
    monkeypatch.setattr(module, "pip_configuration", dict)
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: None)
    return module


@pytest.fixture
def calls(install, monkeypatch):
    """What is called to install the project alone; each program in ``failing`` fails."""
    versions = {"torch": "2.5.0", "torchvision": "0.20.0", "setuptools": "80.9.0"}
    monkeypatch.setattr(install, "installed_version", versions.get)
    monkeypatch.setattr(install, "find_detectron2", lambda: "0.6 at /there")
    made, failing = [], set()

    def call(command, **kwargs):
        made.append(command)
        return int(bool(failing & set(command)))

    monkeypatch.setattr(install.subprocess, "call", call)
    install.failing = failing
    return made


def dry_run(install, capsys, *args: str) -> str:
    assert install.main(["--dry-run", "--system", *args]) == 0
    return capsys.readouterr().out


def test_bare_environment(install, capsys, monkeypatch):
    monkeypatch.setattr(install, "installed_version", lambda name: None)
    monkeypatch.setattr(install, "find_detectron2", lambda: None)
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    out = dry_run(install, capsys, "--extras", "demo,test")
    assert f"sal-detectron2==0.7.2 --hash=sha256:{SHA256}" in out
    assert "--require-hashes" in out and "--no-deps" in out
    assert "torch==2.14.1 torchvision==0.29.1" in out
    assert "--editable '.[demo,test]'" in out
    assert "tensorboard" in out  # one of Detectron2's own needs


def test_aarch64_has_its_own_torch(install, capsys, monkeypatch):
    monkeypatch.setattr(install, "installed_version", lambda name: None)
    monkeypatch.setattr(install, "find_detectron2", lambda: None)
    monkeypatch.setattr(install.platform, "machine", lambda: "aarch64")
    assert "torch==2.9.1 torchvision==0.24.1" in dry_run(install, capsys)


def test_existing_torch_and_detectron2_are_left_alone(install, capsys, monkeypatch):
    versions = {"torch": "2.5.0+cu121", "torchvision": "0.20.0", "setuptools": "80.9.0"}
    monkeypatch.setattr(install, "installed_version", versions.get)
    monkeypatch.setattr(install, "find_detectron2", lambda: "0.6 at /there")
    out = dry_run(install, capsys)
    assert "Detectron2 0.6 at /there is already there, leaving it alone" in out
    assert SHA256 not in out and "tensorboard" not in out
    assert out.count("pip install") == 1  # the project itself
    assert "torch==2.5.0+cu121" in out  # ... which must not replace torch


@pytest.mark.parametrize("version", ["69.5.1", "81.0.0", None])
def test_unfit_setuptools_is_replaced(install, capsys, monkeypatch, version):
    versions = {"torch": "2.5.0", "torchvision": "0.20.0", "setuptools": version}
    monkeypatch.setattr(install, "installed_version", versions.get)
    monkeypatch.setattr(install, "find_detectron2", lambda: "0.6 at /there")
    assert dry_run(install, capsys).count("pip install") == 2


def fake_detectron2(folder: Path, modeling: str) -> None:
    package = folder / "detectron2"
    (package / "modeling").mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "9.9"\n')
    (package / "modeling" / "__init__.py").write_text(modeling)


def run_with(folder: Path) -> subprocess.CompletedProcess:
    """A dry run in its own process whose first `detectron2` is the one in `folder`."""
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(folder)!r})\n"
        f"sys.argv = ['install.py', '--dry-run', '--system']\n"
        f"import importlib.metadata as m; real = m.version\n"
        # As if the pinned wheel were not there, so that what is found has to be judged.
        f"m.version = lambda n: real('no-such-package' if n == 'sal-detectron2' else n)\n"
        f"runpy.run_path({str(ROOT / 'tools' / 'install.py')!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": str(folder)},
    )


def test_importable_detectron2_is_found(tmp_path):
    fake_detectron2(tmp_path, "ViT = None\n")
    done = run_with(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Detectron2 9.9 at {tmp_path / 'detectron2'} is already there" in done.stdout
    assert SHA256 not in done.stdout


def test_detectron2_without_vitdet_is_an_error(tmp_path):
    fake_detectron2(tmp_path, "")
    done = run_with(tmp_path)
    assert done.returncode == 2
    assert "older than ViTDet" in done.stderr and len(done.stderr.splitlines()) == 1


def test_refuses_a_system_interpreter(install, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    assert install.main(["--dry-run"]) == 2
    captured = capsys.readouterr()
    assert "is not in a virtual or conda environment" in captured.err
    assert len(captured.err.splitlines()) == 1 and captured.out == ""
    (tmp_path / "conda-meta").mkdir()
    assert install.is_isolated()


@pytest.mark.parametrize("version", [(3, 9, 1), (3, 13, 0)])
def test_refuses_other_pythons(install, capsys, monkeypatch, version):
    monkeypatch.setattr(sys, "version_info", version)
    assert install.main(["--dry-run"]) == 2
    assert "Python 3.10, 3.11 or 3.12 is needed" in capsys.readouterr().err


def test_uv_installs_and_is_not_left_behind(install, calls, monkeypatch):
    monkeypatch.setattr(
        install.shutil, "which", lambda name, path=None: path and str(Path(path) / "uv")
    )
    assert install.main(["--system"]) == 0
    fetch, project = calls
    folder = fetch[fetch.index("--target") + 1]
    assert fetch[:3] == [sys.executable, "-m", "pip"] and "uv" in fetch
    assert project[:5] == [f"{folder}/bin/uv", "pip", "install", "--python", sys.executable]
    assert "." in project and "torch==2.5.0" in project
    assert not Path(folder).exists()


def test_an_installed_uv_is_used(install, calls, monkeypatch):
    monkeypatch.setattr(install.shutil, "which", lambda name, path=None: "/there/uv")
    monkeypatch.setattr(install, "pip_configuration", lambda: {"constraint": "/a.txt /b.txt"})
    assert install.main(["--system"]) == 0
    (project,) = calls
    assert project[0] == "/there/uv"
    assert " ".join(project).count("--constraint /a.txt --constraint /b.txt") == 1


@pytest.mark.parametrize("failing", ["uv", "/there/uv"])
def test_pip_does_what_uv_cannot(install, calls, monkeypatch, capsys, failing):
    if failing == "/there/uv":
        monkeypatch.setattr(install.shutil, "which", lambda name, path=None: failing)
    install.failing.add(failing)
    assert install.main(["--system"]) == 0
    tried, project = calls
    assert failing in tried
    assert project[:3] == [sys.executable, "-m", "pip"] and "torch==2.5.0" in project
    assert "  uv could not " in capsys.readouterr().out


def test_an_index_that_pip_is_told_is_kept(install, calls, monkeypatch):
    monkeypatch.setattr(install.shutil, "which", lambda name, path=None: "/there/uv")
    monkeypatch.setattr(install, "pip_configuration", lambda: {"index-url": "https://ours"})
    assert install.main(["--system"]) == 0
    (project,) = calls
    assert project[:3] == [sys.executable, "-m", "pip"] and "torch==2.5.0" in project


def test_pip_configuration(monkeypatch, tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nextra-index-url = https://one\n  https://two\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_INDEX_URL", "https://ours=1")
    found = load_install().pip_configuration()
    assert found["index-url"] == "https://ours=1"
    assert found["extra-index-url"].split() == ["https://one", "https://two"]


def test_failure_of_pip_is_one_sentence(install, calls, capsys):
    install.failing.add("pip")
    assert install.main(["--system"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("install.py: pip could not install expedit_d2")
    assert len(error.splitlines()) == 1


def test_a_full_disk_is_refused_before_pip_runs(install, capsys, monkeypatch):
    monkeypatch.setattr(install, "installed_version", lambda name: None)
    monkeypatch.setattr(install.platform, "system", lambda: "Linux")
    monkeypatch.setattr(install.platform, "machine", lambda: "x86_64")
    usage = install.shutil.disk_usage("/")._replace(free=5_300_000_000)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda folder: usage)
    assert install.main(["--system"]) == 2
    err = capsys.readouterr().err
    assert "has 5.3 GB of free disk space, and 7 GB are needed" in err


def test_setup_reads_the_version_without_importing_torch():
    text = (ROOT / "expedit_d2" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "setup.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == version
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "setuptools" in imported
    assert not {"torch", "expedit_d2"} & imported
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_ruff_is_pinned_once():
    pinned = re.search(r'"ruff==([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"rev: v{pinned.group(1)} " in hooks


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what the wheel holds, made from a copy as building leaves traces."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("expedit_d2", "configs", "projects"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", folder, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def from_outside(site: Path, folder: Path, code: str) -> str:
    """What a program prints that finds the wheel's content and nothing of this repository."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_every_file_and_one_name(site):
    """A folder `projects` of somebody's own, such as Detectron2's, stays importable."""
    (info,) = site.glob("*.dist-info")
    assert (info / "top_level.txt").read_text().split() == ["expedit_d2"]
    assert sorted(path.name for path in site.iterdir()) == sorted(["expedit_d2", info.name])
    assert "expedit = expedit_d2.cli.main:main" in (info / "entry_points.txt").read_text()
    package = site / "expedit_d2"
    for name, inside in (("expedit_d2", "."), ("configs", "configs"), ("projects", "projects")):
        for file in (ROOT / name).rglob("*.*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert (package / inside / file.relative_to(ROOT / name)).is_file(), file


def test_help_from_outside(site, tmp_path):
    code = "from expedit_d2.cli.main import main; main(['{}', '--help'])"
    for command in ("compare", "train"):
        printed = from_outside(site, tmp_path, code.format(command))
        assert f"usage: expedit {command}" in printed
    code = (
        "import sys; from expedit_d2.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'detectron2', 'numpy'} & set(sys.modules)"
    )
    assert "compare" in from_outside(site, tmp_path, code)


def test_configs_from_outside(site, tmp_path):
    (tmp_path / "projects").mkdir()
    (tmp_path / "projects" / "mine.py").write_text("")
    code = """
import projects.mine
import expedit_d2
from expedit_d2.projects import load_cfg
from expedit_d2.projects.Mask2Former import add_maskformer2_config
for name in ("embedded/small_segmenter.yaml", "configs/embedded/small_segmenter.yaml"):
    print(load_cfg(name, ["MODEL.DEVICE", "cpu"]).MODEL.WEIGHTS)
print(expedit_d2.config_file("embedded/dinov2_dpt.yaml"))
print(load_cfg("projects/DPT/configs/dpt_large_midas.yaml").MODEL.META_ARCHITECTURE)
"""
    weights = site / "expedit_d2/projects/Segmenter/weights/small_segmenter_collage.pth"
    config = site / "expedit_d2" / "configs" / "embedded" / "dinov2_dpt.yaml"
    assert from_outside(site, tmp_path, code).split() == [*2 * [str(weights)], str(config), "DPT"]


def test_without_detectron2(site, tmp_path):
    """What needs it says so; the rest works: `expedite`, and files that come with the package."""
    code = """
import sys
sys.modules["detectron2"] = None  # cannot be imported then
import timm, torch
from expedit_d2 import config_file, expedite
print(config_file("embedded/dinov2_dpt.yaml").name)
vit = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
with torch.no_grad(), expedite(vit, 1, grid=(4, 4)):
    print(vit(torch.zeros(1, 3, 224, 224)).shape[1])
sys.stderr = sys.stdout
from expedit_d2.cli.main import main
for arguments in (["compare"], ["compare", "--first", "0"]):
    try:
        main(arguments)
    except SystemExit as left:
        print(left.code)
"""
    lines = from_outside(site, tmp_path, code).splitlines()
    assert lines[:2] == ["dinov2_dpt.yaml", "1000"]
    assert lines[2].startswith("expedit compare: Detectron2 is not installed, ")
    assert lines[4].startswith("expedit compare: argument --first: must be a whole number")
    assert lines[3] == lines[5] == "2" and len(lines) == 6
