"""How a run of the optimisation is saved mid-way and taken up again.

Everything a step reads or changes is kept, so an interrupted run ends with the same bits. What is saved is on the CPU, and goes on there or on a GPU.
"""

from pathlib import Path

import torch

from s2d.densify import DensifyState
from s2d.gaussians import Checkpoint, Gaussians, load_checkpoint, save_checkpoint
from s2d.optim import LearningRates
from s2d.refinement import Refinement, RefinementRates
from s2d.sampling import ViewSampler
from s2d.training import TrainingRun, read_losses, start_run


def run_checkpoint(run: TrainingRun) -> Checkpoint:
    """Return the run as a checkpoint that `load_run` and stage 3 read."""
    return Checkpoint(
        gaussians=run.gaussians,
        step=run.step,
        scene_extent=run.scene_extent,
        optimizer_state=run.optimizer.state_dict(),
        run_state={
            "sampler": run.sampler.state_dict(),
            "generator": run.generator.get_state(),
            "grad_sum": run.densify_state.grad_sum,
            "num_views": run.densify_state.num_views,
            "history": run.history,
            "seconds": run.seconds,
            "refinement": None if run.refinement is None else run.refinement.state_dict(),
            "strategies": None if run.strategies is None else run.strategies.state_dict(),
            "backdrop": None if run.backdrop is None else run.backdrop.tensors(),
        },
    )


def saved_backdrop(saved: Checkpoint) -> Gaussians | None:
    """What the Gaussians of a checkpoint were trained in front of; None is black."""
    tensors = (saved.run_state or {}).get("backdrop")
    return None if tensors is None else Gaussians(**tensors)


def save_run(run: TrainingRun, path: Path) -> None:
    """Save mid-way, all or nothing."""
    read_losses(run)
    save_checkpoint(path, run_checkpoint(run))


def load_run(
    path: Path,
    rates: LearningRates,
    sampler: ViewSampler,
    refinement_rates: RefinementRates | None = None,
    device: torch.device | str = "cpu",
) -> TrainingRun:
    """Continue a saved run on a device; `sampler` must be made from the same views, and is set to its saved state.

    Cameras that were refined stay so; they go on learning at `refinement_rates`.
    """
    saved = load_checkpoint(path)
    if saved.run_state is None:
        raise ValueError(f"{path} holds no run to continue. Delete it and start the stage again.")
    gaussians = saved.gaussians.to(device)
    run = start_run(
        gaussians, rates, saved.scene_extent, sampler, 0, saved.step, saved.optimizer_state
    )
    run.sampler.load_state_dict(saved.run_state["sampler"])
    run.generator.set_state(saved.run_state["generator"])
    statistics = (saved.run_state[name].to(device) for name in ("grad_sum", "num_views"))
    run.densify_state = DensifyState(*statistics)
    run.history = saved.run_state["history"]
    run.seconds_before = saved.run_state["seconds"]
    # Runs that were saved before there were strategies have none.
    run.strategy_state = saved.run_state.get("strategies")
    run.stand_before(saved_backdrop(saved))
    if saved.run_state["refinement"] is not None:
        run.refinement = Refinement.from_state(
            saved.run_state["refinement"],
            refinement_rates or RefinementRates(),
            with_optimizer=True,
            device=device,
        )
    return run
