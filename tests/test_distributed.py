"""Two processes against one on the joined batch: loss, every gradient, and the collectives in the backward."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gmail_lightning import distributed

SCRIPT = Path(__file__).parent / "distributed" / "loss_ranks.py"
TASK_SCRIPT = SCRIPT.with_name("task_ranks.py")


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loss_ranks = load_script(SCRIPT)

pytestmark = [pytest.mark.xdist_group("launches"), pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "MASTER_"))}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        outside["MASTER_PORT"] = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder)],
            env=outside,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(loss_ranks.RANKS)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(loss_ranks.RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("case", loss_ranks.CASES | loss_ranks.GATHERING)
def test_two_processes_equal_one(ranks, case):
    loss, trained = (loss_ranks.CASES | loss_ranks.GATHERING)[case]
    expected = loss_ranks.backward(loss_ranks.TwoTowers(loss, trained), loss_ranks.joined_batch())
    for results in ranks:
        actual = results[case]
        assert actual["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
        assert actual["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            assert gradient.norm() > 1e-4  # a vanishing gradient would prove nothing
            assert (actual["gradients"][name].norm() / gradient.norm()).item() == pytest.approx(1, abs=1e-5)
            torch.testing.assert_close(actual["gradients"][name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max())
    assert torch.equal(ranks[0][case]["loss"], ranks[1][case]["loss"])


@pytest.mark.parametrize("case", loss_ranks.CASES)
def test_the_backward_issues_no_collective(ranks, case):
    for results in ranks:
        assert results[case]["forward_calls"] > 0
        assert results[case]["backward_calls"] == 0
        assert results["control"]["backward_calls"] > 0


def test_the_safe_path_is_taken_together(ranks):
    for results in ranks:  # it sums once more over the ranks
        assert results["clip, safe path"]["forward_calls"] > results["clip, ids"]["forward_calls"]


def test_unequal_rows_are_an_error_on_every_rank(ranks):
    for results in ranks:
        assert "same number of rows, got [3, 4] on ranks 0 to 1" in results["refusal"]


def test_rows_are_gathered_in_the_order_of_the_ranks(ranks):
    joined = loss_ranks.joined_batch()[0]
    for rank, results in enumerate(ranks):
        assert (results["rank"], results["world_size"]) == (rank, 2)
        assert torch.equal(results["gathered"], joined)


def test_the_first_process_decides_for_all(ranks):
    for results in ranks:
        assert results["decided"] == [{"folder": "made by rank 0"}, "rank 0 does not like it"]


def test_one_process_needs_no_collective():
    tensor = torch.randn(3, 2)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_rows(tensor) is tensor
    assert torch.equal(distributed.all_reduce(tensor.clone(), "sum"), tensor)
    distributed.require_equal_rows(tensor)


@pytest.mark.slow
def test_two_processes_align_and_validate_as_one(tmp_path: Path) -> None:
    """The same global batches, weights, metrics and features; every image once; no collective in an evaluation step."""
    outside = ("PYTEST", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(outside)}
    command = [sys.executable, str(TASK_SCRIPT), "2", str(tmp_path)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    load_script(TASK_SCRIPT).main(1, tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert any(name.endswith(".B") and p.abs().max() > 1e-5 for name, p in one["weights"].items())
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-4, atol=1e-6)
    assert two["results"] == {name: pytest.approx(value, abs=2e-3) for name, value in one["results"].items()}
    assert two["collectives"] == 0
    metrics = one["metrics"]  # every row counted once, though the ranks have 6 and 5 images, and 1 and 0
    assert (metrics["num_images"], metrics["num_texts"], metrics["alone_num_texts"]) == (11, 33, 3)
    assert 0 < metrics["t2i_R@1"] < metrics["t2i_R@3"] < 1
    assert 0 < metrics["accuracy"] < 1
    torch.testing.assert_close(two["metrics"], metrics, equal_nan=True)
    described = [torch.load(tmp_path / f"captions-{name}.pt") for name in ("1-0", "2-0", "2-1")]
    one_step, *accumulated = described[0]["task"]["weights"], *(values.pop("accumulated") for values in described[1:])
    for weights in accumulated:  # two ranks of two micro-batches each, of unequal numbers of tokens, are one batch
        for name, value in one_step.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)
    compare_captioners(*(values.pop("task") for values in described))
    compare_joint_steps(*(values.pop("unidiff") for values in described))
    compare_faults(*(values.pop("faults") for values in described))
    compare_first_rank(*(values.pop("first rank") for values in described))
    compare_captions(*described)
    seen = [torch.load(tmp_path / f"seen-2-{rank}.pt") for rank in (0, 1)]
    assert sorted([*seen[0], *seen[1]]) == sorted(torch.load(tmp_path / "seen-1-0.pt"))
    assert len(set(seen[0]) | set(seen[1])) == len(seen[0]) + len(seen[1]) == 2 * 373
    stores = [tmp_path / f"features-{n}" for n in (1, 2)]
    assert all({p.name for p in store.iterdir()} == {"features.npy", "rows.parquet", "store.json"} for store in stores)
    features = [torch.from_numpy(np.load(store / "features.npy")) for store in stores]
    assert features[0].shape == (2 * 373, 16)
    torch.testing.assert_close(*features, rtol=1e-5, atol=1e-6)
    assert (stores[0] / "rows.parquet").read_bytes() == (stores[1] / "rows.parquet").read_bytes()


def compare_joint_steps(one, first, second) -> None:
    """Every parameter that trains has the gradient of one process; negatives of prediction_contrast are of the rank."""
    assert one.keys() == {"none", "feature", "reciprocal_kl", "image", "prediction_contrast"}
    for reading, steps in one.items():
        assert len(steps) == len(first[reading]) == 2
        for expected, of_first, of_second in zip(steps, first[reading], second[reading], strict=True):
            assert all(torch.equal(of_first[name], gradient) for name, gradient in of_second.items())
            assert expected.keys() == of_first.keys()
            assert all(gradient.any() for gradient in of_first.values())
            if reading != "prediction_contrast":
                for name, gradient in expected.items():
                    torch.testing.assert_close(of_first[name], gradient, rtol=1e-4, atol=3e-6)


def compare_captions(one, first, second) -> None:
    """Caption metrics of one process and of two ranks are the same floats; an error reaches both ranks."""
    messages = [values.pop("conflict", None) for values in (one, first, second)]
    if shutil.which("java") is None:  # then METEOR has no value anywhere, and says why
        for values in (one, first, second):
            assert values["reasons"].keys() == {"METEOR"}
            assert "no java on the PATH" in values["reasons"]["METEOR"]
            assert all(values[name].pop("METEOR").isnan() for name in ("all", "alone"))
            assert np.isnan(values["per_image"].pop("METEOR")).all()
            assert values["tokenizer"] == "python"
    else:
        assert (one["tokenizer"], one["reasons"]) == ("java", {})
        assert 0 < one["all"]["METEOR"] != one["alone"]["METEOR"] > 0
    assert one == first == second
    assert one["image_ids"] == list(range(11))
    assert all(len(scores) == 11 for scores in one["per_image"].values())
    assert one["all"].keys() == one["alone"].keys() == one["per_image"].keys()
    assert 0 < one["all"]["CIDEr"] != one["alone"]["CIDEr"]
    assert one["unique_captions"] == pytest.approx(6 / 11)  # the last image is on both ranks, and counts once
    assert one["mean_length"] == pytest.approx((2 * (1 + 1 + 2 + 1 + 1) + 1) / 11)
    letters = ["ABC"[i % 3] == "AB"[i % 2] for i in range(11)]
    assert (one["questions"], one["IMG-Accuracy"]) == (11, pytest.approx(sum(letters) / 11))
    assert messages[0] is None
    assert (
        messages[1]
        == messages[2]
        == "id 7 came twice with different captions: ['a man', 'a cat'] and ['a horse', 'a cat']."
    )


def compare_faults(one, first, second) -> None:
    """An error of the first rank, whatever its kind, ends every rank at once with the same message."""
    assert first == second
    expected = {
        "plain": "ZeroDivisionError: by zero",
        "of the group": "ValueError: a value",
        "leakage": "KeyError: 'train'",
        "disk": "OSError: [Errno 28] No space left on device",
        "fine": "of rank 0",
        "files": "last.ckpt",
    }
    assert expected.items() <= one.items()
    assert expected.items() <= first.items()
    assert first["local"].endswith("Local: 1 and 2")
    assert "pickle" in first["result"]


def compare_first_rank(one, first, second) -> None:
    """Ranks without an update take part in the exchange; rows that cannot be joined are an error on every rank."""
    assert "wider" not in one
    assert first["wider"] == second["wider"]
    assert "Rows of different types or widths cannot be joined" in first.pop("wider")
    del second["wider"]
    assert one == first == second
    assert one["nobody"] == [{}, {}, {}]
    assert (one["recall"]["num_images"], one["choices"]["questions"]) == (6, 2)
    assert one["statistics"]["unique_captions"] == 0.5
    assert one["no ids"]["unique_captions"] == pytest.approx(2 / 3)
    assert one["gap"]["paired_cosine"] != one["gap"]["shuffled_cosine"]
    assert 0 < one["scores"]["Bleu_1"] < 1


def compare_captioners(one, first, second) -> None:
    """A captioner trained on two ranks: the same weights, captions and values; every image on one of them."""
    rows = [sorted(values["noted"]) for values in (one, first, second)]
    assert (len(rows[0]), {len(rows[1]), len(rows[2])}) == (19, {9, 10})
    assert [row for row, _, _ in sorted(rows[1] + rows[2])] == list(range(19))  # each id once
    assert sorted(rows[1] + rows[2]) == rows[0]
    assert len({caption for _, _, caption in rows[0]}) > 10
    for name, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(first["weights"][name], second["weights"][name])
    assert first["results"] == second["results"] == pytest.approx(one["results"], abs=1e-6)
    assert one["results"].keys() >= {"Bleu_4", "ROUGE_L", "CIDEr", "unique_captions", "mean_length", "generated_CIDEr"}
    assert all(one["results"][name] > 0.01 for name in ("Bleu_1", "CIDEr", "generated_Bleu_1", "generated_CIDEr"))


@pytest.mark.parametrize(
    ("variables", "num_nodes", "place"),
    [
        ({}, 1, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, (0, 1)),  # left over in a shell
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "1", "WORLD_SIZE": "2"}, 1, (1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 2, (1, 2)),  # Kubeflow
        ({"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 2, (1, 2)),
    ],
)
def test_the_place_of_a_process(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], num_nodes: int, place: tuple[int, int]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed._place(num_nodes) == place
