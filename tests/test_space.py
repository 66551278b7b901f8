"""The search space: which orders are legal, what a trial can ask for, and words about an empty one."""

import optuna
import pytest

from compactmind.errors import CompactMindError
from compactmind.methods.registry import METHODS, as_choice
from compactmind.search.compressor import read_pipeline
from compactmind.search.space import SEPARATOR, labels, make_space

ALL = tuple(name for name in METHODS if name != "sparse24")


def names(space):
    return {SEPARATOR.join(order) for order in space.orders}


def test_the_orders_are_the_legal_ones():
    result = names(make_space(("prune", "retrain", "w8a8"), max_length=3))
    assert result == {"prune", "w8a8", "prune > retrain", "prune > w8a8", "prune > retrain > w8a8"}
    everything = names(make_space(ALL, max_length=4))
    assert {"smooth > prune > nf4", "prune > smooth > nf4", "prune > retrain > smooth > w8a8"} <= everything
    assert not any(order.startswith("retrain") or order.endswith("smooth") or "w8a8 >" in order for order in everything)
    assert {"gptq", "smooth > gptq", "prune > retrain > gptq", "prune > smooth > retrain > gptq"} <= everything
    # By hand: 3 quantizations, smoothed 3; prune, retrained; both with a quantization 3 + 3; with a smoothing before that, 2 and 3 places.
    assert len(everything) == 3 + 3 + 1 + 1 + 3 + 3 + 2 * 3 + 3 * 3


def test_by_the_text_a_model_may_be_retrained_of_which_nothing_was_cut():
    usual, by_text = (names(make_space(ALL, by_text=by_text)) for by_text in (False, True))
    quantizations = ("w8a8", "nf4", "gptq")
    more = {f"{before}{name}" for name in quantizations for before in ("retrain > ", "smooth > retrain > ", "retrain > smooth > ")}
    assert by_text - usual == more and usual < by_text
    space = make_space(("retrain", "smooth", "gptq"), targets=(4.0,), by_text=True)
    guesses = space.first_guesses(lambda pipeline: pipeline[-1]["params"]["target_compression"] if "params" in pipeline[-1] else 1, 4.0)
    assert [guess["order"] for guess in guesses] == ["gptq", "retrain > gptq", "smooth > retrain > gptq"]


def test_zeros_alone_make_nothing_smaller_and_are_no_pipeline_of_a_search():
    result = names(make_space(("sparse24", "retrain", "w8a8"), max_length=3))
    assert result == {"w8a8", "sparse24 > w8a8", "sparse24 > retrain > w8a8"}


def test_what_would_fill_zeros_is_not_asked_for():
    space = make_space(tuple(METHODS), max_length=4)
    assert "sparse24 > w8a8" in names(space) and not any("sparse24" in order and "gptq" in order for order in space.orders)
    sparse = make_space(("sparse24", "retrain", "w8a8", "nf4"), choices={"retrain.lr": [1e-4], "retrain.tokens": [4096]})
    points = [point for point in sparse.points() if point["order"].startswith("sparse24")]
    assert len(points) == 2 * (1 + 3) * (6 * 2 * 2 + 2 * 3)  # criteria, with retraining three times as many; w8a8 without rotations, nf4
    assert sparse.size() == len(list(sparse.points()))
    for point in points:
        *_, last = read_pipeline(sparse.pipeline(point))
        assert last.method.fills_zeros(last.recipe) is None
    beside = [other for point in points[:40] for other in sparse.neighbours(point)]
    assert beside and all(read_pipeline(sparse.pipeline(other)) for other in beside)
    assert {"w8a8.rotations", "nf4.compensation"} <= {name for point in sparse.points() for name in point}
    only = make_space(("sparse24", "w8a8"), choices={"w8a8.rotations": [["o"]]})
    assert names(only) == {"w8a8"}  # with these choices it always would


def test_every_order_is_one_the_compressor_takes():
    for order in make_space(ALL, max_length=5, max_repeats=2).orders:
        read_pipeline([{"method": name} for name in order])


def test_a_method_can_be_allowed_again_but_not_twice_in_a_row():
    result = names(make_space(("prune", "retrain"), max_length=4, max_repeats=2))
    assert "prune > retrain > prune > retrain" in result and "prune > retrain > prune" in result
    assert not any("prune > prune" in order or "retrain > retrain" in order for order in result)
    assert labels(("prune", "retrain", "prune", "retrain")) == ["prune", "retrain", "prune2", "retrain2"]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("single", {"prune", "prune > retrain", "nf4"}), ("hybrid", {"prune > nf4", "prune > retrain > nf4"})],
)
def test_the_mode_decides_how_many_methods_compress(mode, expected):
    assert names(make_space(("prune", "retrain", "nf4"), mode=mode)) == expected


def test_its_points_are_its_size_and_every_one_can_be_asked_for():
    choices = {
        "prune.sparsity": [0.1, 0.2, 0.3], "prune.criterion": ["taylor"], "prune.scope": ["uniform", "global"], "prune.blocks": [0],
        "prune.structures": [["channels"]], "w8a8.rotations": [["o"], ["o", "down"]], "w8a8.embeddings": ["int8"],
    }  # fmt: skip
    space = make_space(("prune", "w8a8"), choices={**choices, "w8a8.alpha": ["per_layer", 0.5]})
    points = list(space.points())
    w8a8 = 2 * 2 * 2
    assert len(points) == space.size() == 6 + w8a8 + 6 * w8a8
    assert len({tuple(sorted(point.items(), key=str)) for point in points}) == len(points)
    study = optuna.create_study()
    for point in points:
        study.enqueue_trial(point)
        trial = study.ask()
        pipeline = space.suggest(trial)
        assert trial.params == pytest.approx(point) or trial.params == point
        assert SEPARATOR.join(step["method"] for step in pipeline) == point["order"]
        for step in pipeline:
            for name, value in step["params"].items():
                values = space.choices[step["method"]][name]
                assert value in values and (len(values) == 1 or point[f"{step['method']}.{name}"] == as_choice(value))
                assert (f"{step['method']}.{name}" in point) == (len(values) > 1)  # what has one value is not asked for


def test_numbers_in_even_steps_are_numbers_to_the_sampler_and_come_back_exactly():
    trial = optuna.create_study().ask()
    params = METHODS["prune"].suggest(
        trial, "prune2", {"sparsity": (0.1, 0.2, 0.3), "round_to": (32, 64), "scope": ("global", "uniform"), "rounds": (2,)}
    )
    kinds = {name: type(distribution).__name__ for name, distribution in trial.distributions.items()}
    assert kinds == {
        "prune2.sparsity": "FloatDistribution", "prune2.round_to": "IntDistribution", "prune2.scope": "CategoricalDistribution",
    }  # fmt: skip
    assert params["sparsity"] in (0.1, 0.2, 0.3) and params["rounds"] == 2


def test_the_first_guesses_are_the_least_sparse_pipelines_that_reach_the_target():
    choices = {"prune.sparsity": [0.1, 0.3, 0.5], "retrain.tokens": [4096, 8192], "w8a8.embeddings": ["as_released", "int8"]}
    space = make_space(("prune", "retrain", "smooth", "w8a8", "nf4"), choices=choices)

    def ratio(pipeline):
        params = {step["method"]: step["params"] for step in pipeline}
        result = 1 / (1 - params.get("prune", {}).get("sparsity", 0.0))
        if "w8a8" in params:
            result *= 2 if params["w8a8"]["embeddings"] == "int8" else 1.6
        return result * (2.4 if "nf4" in params else 1)

    guesses = {guess["order"]: guess for guess in space.first_guesses(ratio, 2.5)}
    assert list(guesses) == [  # no single one is enough; the least pruned first, then the shortest
        "prune > retrain > nf4",
        "prune > smooth > retrain > nf4",
        "prune > retrain > w8a8",
        "prune > smooth > retrain > w8a8",
    ]
    assert [guess["prune.sparsity"] for guess in guesses.values()] == [0.1, 0.1, 0.3, 0.3]
    assert guesses["prune > retrain > w8a8"]["w8a8.embeddings"] == "int8"
    usual = {"prune.criterion": "taylor", "retrain.tokens": 8192, "retrain.lr": 1e-4, "retrain.alpha": 0.5}
    assert usual.items() <= guesses["prune > retrain > nf4"].items()
    study = optuna.create_study()
    for guess in guesses.values():  # each is a point of the space
        study.enqueue_trial(guess)
        trial = study.ask()
        assert ratio(space.suggest(trial)) >= 2.5 and trial.params == guess
    assert {guess["order"] for guess in space.first_guesses(ratio, 2.0)} >= {"nf4", "w8a8"}
    assert space.first_guesses(ratio, 100.0) == []
    untrained = make_space(("prune", "smooth", "nf4"), choices={"prune.sparsity": [0.1, 0.3]})
    assert [guess["order"] for guess in untrained.first_guesses(ratio, 2.5)] == ["prune > nf4", "prune > smooth > nf4"]


def test_the_guesses_of_several_workers_do_not_begin_alike_at_the_same_time():
    space, targets = make_space(("prune", "retrain", "smooth", "gptq"), targets=(2.5, 3.0, 4.0), by_text=True), (2.5, 3.0, 4.0)

    def ratio(pipeline):
        return pipeline[-1]["params"].get("target_compression", 1.0)

    alone, of_two = (space.guesses_for(targets, ratio, workers) for workers in (1, 2))
    assert [guess["order"] for guess in alone[:6]] == ["gptq"] * 3 + ["retrain > gptq"] * 3
    assert of_two[:6] == [alone[0], alone[3], alone[1], alone[4], alone[2], alone[5]]
    assert len(alone) == len(of_two) and all(guess in alone for guess in of_two)
    pairs = list(zip(of_two[:12:2], of_two[1:12:2], strict=True))  # of four orders; the last one has no other beside it
    assert len({guess["order"] for guess in alone}) == 5 and all(one["order"] != other["order"] for one, other in pairs)


def test_a_first_guess_gives_away_no_more_bits_than_the_target_asks_for():
    choices = {"gptq.bits": [3, 4, 6], "gptq.group_size": [32, 128], "gptq.embeddings": ["int8", "int4"]}
    choices |= {"gptq.zero": ["symmetric"], "gptq.damping": [0.05]}
    space = make_space(("gptq",), choices=choices)

    def ratio(pipeline):
        params = pipeline[0]["params"]
        return 16 / (params["bits"] + 16 / params["group_size"] + (1 if params["embeddings"] == "int8" else 0))

    (guess,) = space.first_guesses(ratio, 2.55)
    # 2.61; with 4 bits at least 2.9
    assert guess == {"order": "gptq", "gptq.bits": 6, "gptq.group_size": 128, "gptq.embeddings": "int4"}
    (guess,) = space.first_guesses(ratio, 3.0)
    assert (guess["gptq.bits"], guess["gptq.group_size"], guess["gptq.embeddings"]) == (4, 128, "int8")  # 3.12


def test_gptq_aims_at_the_target_of_a_search_and_is_among_the_first_guesses():
    methods = ("prune", "retrain", "smooth", "w8a8", "nf4", "gptq")
    space = make_space(methods, targets=(2.5,))
    assert space.choices["gptq"] == {"target_compression": (2.5,), **METHODS["gptq"].aimed}
    assert all(len(values) > 1 for values in METHODS["gptq"].aimed.values())  # there is something to find at one target

    def ratio(pipeline):
        params = {step["method"]: step["params"] for step in pipeline}
        if "gptq" in params:
            return params["gptq"]["target_compression"]
        return (2.3 if "nf4" in params else 1.6) / (1 - params.get("prune", {}).get("sparsity", 0.0))

    guesses = [guess["order"] for guess in space.first_guesses(ratio, 2.5)]
    assert guesses[:4] == ["gptq", "smooth > gptq", "prune > retrain > gptq", "prune > smooth > retrain > gptq"]
    small = [guess["order"] for guess in space.first_guesses(ratio, 2.2)]  # nf4 reaches 2.3: of equals the largest comes first
    assert small[:4] == ["nf4", "gptq", "smooth > nf4", "smooth > gptq"]
    usual = {"gptq.damping": 0.05, "gptq.weigh_tokens": False, "gptq.stream_rotation": False}
    assert space.first_guesses(ratio, 2.5)[0] == {"order": "gptq", **usual}
    # no target, none it takes, the user's own choices
    for targets, choices in (((), {}), ((50.0,), {}), ((1.0,), {}), ((2.5,), {"gptq.bits": [4]})):
        assert "target_compression" not in make_space(methods, targets=targets, choices=choices).choices["gptq"]


def test_a_ratio_that_gptq_does_not_take_leaves_it_the_others_and_is_named(capsys):
    assert make_space(("gptq",), targets=(2.5, 3.0)).choices["gptq"]["target_compression"] == (2.5, 3.0)
    assert capsys.readouterr().out == ""
    assert make_space(("gptq",), targets=(2.5, 3.0, 16.0)).choices["gptq"]["target_compression"] == (2.5, 3.0)
    assert capsys.readouterr().out == "gptq aims at 2.5, 3 and not at 16: target_compression 16 is not in (1, 16), and not 0 for none\n"
    assert "target_compression" not in make_space(("nf4", "gptq"), targets=(16.0, 20.0)).choices["gptq"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("gptq aims at none of 16, 20, its own parameters are searched: target_compression")


def test_gptq_has_a_target_for_every_size_of_a_front():
    space = make_space(("gptq",), targets=(2.0, 3.0))
    assert space.choices["gptq"]["target_compression"] == (2.0, 3.0)
    guesses = [space.first_guesses(lambda steps: steps[0]["params"]["target_compression"], target) for target in (1.5, 2.5)]
    assert [guess["gptq.target_compression"] for (guess,) in guesses] == [2.0, 3.0]


def test_the_neighbours_of_a_pipeline_differ_in_one_choice():
    choices = {
        "prune.sparsity": [0.1, 0.2, 0.3, 0.4], "prune.criterion": ["taylor", "l2", "variance"], "prune.scope": ["uniform"],
        "prune.blocks": [0], "prune.structures": [["channels"], ["channels", "groups"]], "nf4.compensation": [True],
        "nf4.embeddings": ["int8"], "retrain.tokens": [4096], "retrain.lr": [1e-4],
    }  # fmt: skip
    space = make_space(("prune", "retrain", "nf4"), choices=choices)
    own = {"prune.sparsity": 0.30000000000000004, "prune.criterion": "l2", "prune.structures": "channels", "nf4.double_quantization": False}
    result = space.neighbours({"order": "prune > nf4", **own})
    same = [point for point in result if point["order"] == "prune > nf4"]
    assert {
        "sparsity": [point["prune.sparsity"] for point in same if point["prune.sparsity"] not in (0.3, own["prune.sparsity"])],
        "criterion": [point["prune.criterion"] for point in same if point["prune.criterion"] != "l2"],
        "structures": [point["prune.structures"] for point in same if point["prune.structures"] != "channels"],
        "order": {point["order"] for point in result if point["order"] != "prune > nf4"},
    } == {
        "sparsity": [0.2, 0.4], "criterion": ["taylor", "variance"], "structures": ["channels+groups"],
        "order": {"nf4", "prune", "prune > retrain", "prune > retrain > nf4"},
    }  # fmt: skip
    assert {"order": "prune > retrain > nf4", "retrain.alpha": 0.5, **own} in result
    assert len(result) == 5 + 1 + 4 and all(read_pipeline(space.pipeline(point)) for point in result)


def test_a_neighbour_that_is_pruned_too_is_pruned_the_least():
    space = make_space(("prune", "nf4"), choices={"prune.sparsity": [0.3, 0.05, 0.2]})
    own = {"nf4.double_quantization": True, "nf4.compensation": True, "nf4.embeddings": "int8"}
    (added,) = [point for point in space.neighbours({"order": "nf4", **own}) if point["order"] == "prune > nf4"]
    assert added["prune.sparsity"] == 0.05 and own.items() <= added.items()


def test_a_method_joins_by_being_registered(monkeypatch):
    monkeypatch.setitem(METHODS, "nf3", METHODS["nf4"])
    assert "prune > nf3" in names(make_space(("prune", "nf3")))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"methods": ()}, "no legal pipeline.*no method"),
        ({"methods": ("retrain", "smooth")}, "no legal pipeline of at most 4 step.*retrain, smooth"),
        ({"methods": ("prune",), "mode": "hybrid"}, "no legal pipeline.*mode hybrid"),
        ({"methods": ("shrink",)}, "unknown method 'shrink': choose from prune"),
        ({"methods": ("prune",), "mode": "all"}, "unknown mode 'all'"),
        ({"methods": ("prune",), "choices": {"nf4.double_quantization": [True]}}, "'nf4' is not among"),
        ({"methods": ("prune",), "choices": {"prune.sparsity": 0.2}}, "0.2 is no list"),
        ({"methods": ("prune",), "choices": {"prune.sparsity": []}}, "no list of values"),
        ({"methods": ("prune",), "choices": {"prune.sparsity": [0.2, 2]}}, "sparsity 2 is not in"),
        ({"methods": ("prune",), "choices": {"prune.amount": [1]}}, "no parameter 'amount'"),
    ],
    ids=str,
)
def test_a_space_that_makes_no_sense_is_refused(arguments, expected):
    with pytest.raises(CompactMindError, match=expected):
        make_space(**arguments)
