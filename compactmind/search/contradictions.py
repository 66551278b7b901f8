"""Settings of a search that contradict each other, named before anything is read."""

from collections.abc import Sequence

from compactmind.search.front import objectives_problem


def settings_problem(
    *, strategy: str, sampler: str, objectives: Sequence[str], save_front: Sequence[float], target_compression: float,
    usual_target: float, workers: int, replay: int,
) -> str | None:  # fmt: skip
    """Return which of these settings cannot be meant together and what to choose, None if all can.

    A target that is `usual_target` is nobody's own: a front without it is not contradicted.
    """
    if problem := objectives_problem(strategy, objectives, save_front):
        return problem
    if strategy == "fixed" and tuple(objectives) != ("kl",) and replay < 0:
        named = " ".join(objectives)
        return f"strategy fixed runs one pipeline and compares none: leave --objectives {named} out, or choose --strategy bayesian"
    if sampler == "gp" and strategy != "bayesian":
        return f"sampler gp belongs to strategy bayesian, {strategy} does not use it: leave --sampler out, or choose --strategy bayesian"
    if save_front and target_compression not in (usual_target, *save_front):
        sizes = " ".join(f"{ratio:g}" for ratio in save_front)
        return (
            f"target_compression {target_compression:g} is none of the sizes of save_front {sizes}, which take its place: leave "
            "--target_compression out, name one of them (that model is llama_searched), or add it to --save_front"
        )
    if workers > 1 and (strategy == "fixed" or replay >= 0):
        asked = "--strategy fixed" if strategy == "fixed" else f"--replay {replay}"
        return (
            f"--workers {workers} search together, and {asked} makes one model: leave --workers out (several GPUs: accelerate launch)"
        )
    return None
