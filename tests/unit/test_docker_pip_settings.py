"""What the host's pip offers to an image build."""

from pathlib import Path

import pytest

from tml.docker.pip_settings import make_offer, matching_wheels, read_pins, read_pip_settings

PINS = ["torch==2.13.0", "fbgemm_gpu-cpu==1.8.0"]


def wheels(folder: Path, *names: str) -> Path:
    """A find-links folder."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_only_wheels_of_the_pinned_set_are_offered(tmp_path: Path) -> None:
    links = wheels(
        tmp_path / "links",
        "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl",
        "torch-2.12.0-cp311-cp311-linux_x86_64.whl",
        "fbgemm_gpu_cpu-1.8.0-cp311-cp311-linux_x86_64.whl",
        "fbgemm_gpu-1.8.0-cp311-cp311-linux_x86_64.whl",
    )
    names = [wheel.name.split("-")[0] for wheel in matching_wheels(links, PINS, "cpu")]
    assert names == ["fbgemm_gpu_cpu", "torch"]


def test_a_cpu_build_of_torch_is_not_offered_to_the_gpu_variant(tmp_path: Path) -> None:
    links = wheels(tmp_path / "links", "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl")
    assert matching_wheels(links, PINS, "gpu") == []


def test_addresses_go_along_and_folders_of_this_machine_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    links = wheels(tmp_path / "links", "torch-2.13.0-cp311-cp311-linux_x86_64.whl")
    settings = {
        "index-url": "https://index.example/simple",
        "extra-index-url": "file:///srv/simple https://more.example/simple",
        "find-links": f"{links} https://wheels.example/",
        "cert": str(tmp_path / "none.pem"),
    }
    offer = make_offer(settings, PINS, "cpu")
    assert offer.config == (
        "[global]\n"
        "index-url = https://index.example/simple\n"
        "extra-index-url = https://more.example/simple\n"
        "find-links =\n    /build/wheels\n    https://wheels.example/\n"
    )
    assert offer.certificates is None
    assert "file:///srv/simple is a folder of this machine" in caplog.text
    assert "none.pem is not a file" in caplog.text


def test_a_password_in_an_address_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    offer = make_offer({"index-url": "https://u:planted@index.example/simple"}, PINS, "cpu")
    assert "planted" in offer.config
    assert "planted" not in caplog.text
    assert "planted" not in repr(offer)


def test_nothing_to_offer_is_an_empty_offer() -> None:
    offer = make_offer({}, PINS, "cpu")
    assert (offer.wheels, offer.config, offer.certificates) == ((), "", None)


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://file.example/\nfind-links = /from/file\n"
        "[install]\nfind-links = /from/install\n"
    )
    env = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "HOME": str(tmp_path)}
    settings = read_pip_settings(env | {"PIP_INDEX_URL": "https://env.example/"})
    assert settings["index-url"] == "https://env.example/"
    assert settings["find-links"] == "/from/install"


def test_the_pins_of_this_checkout_are_read() -> None:
    pins = read_pins(Path(__file__).resolve().parents[2] / "requirements")
    assert "docker==7.2.0" in pins
    assert "torch==2.13.0" in pins
    assert len({pin.partition("==")[0].lower() for pin in pins}) == len(pins)
