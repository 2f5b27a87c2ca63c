"""Single keys of a listener can be set without changing its other keys."""

from pathlib import Path

from tests.config.loading import BASE, load, origins


def test_set_changes_one_key_of_a_listener_and_leaves_the_rest(tmp_path: Path) -> None:
    for written in ("127.0.0.1:5", "{address: '127.0.0.1:5'}", "[127.0.0.1:5]", "[{address: '127.0.0.1:5'}]"):
        loaded = load(tmp_path, f"{BASE}listen: {written}\n", {}, {("listen", 0, "account"): "acme"})
        seen = origins(loaded, tmp_path)
        assert (seen["listen[0].address"], seen["listen[0].account"]) == ("config.yaml:3", "--set")
        assert loaded.config.listen[0].address.port == 5
    listen = load(tmp_path, BASE, {}, {("listen", 0, "account"): "acme"}).config.listen
    assert [(str(one.address), one.account) for one in listen] == [("127.0.0.1:8080", "acme")]


def test_each_key_of_a_single_listener_has_its_place(tmp_path: Path) -> None:
    seen = origins(load(tmp_path, f"{BASE}listen:\n  address: unix:/x\n  mode: '0660'\n"), tmp_path)
    assert (seen["listen[0].address"], seen["listen[0].mode"]) == ("config.yaml:4", "config.yaml:5")
    assert seen["listen[0].anonymous"] == "default"
