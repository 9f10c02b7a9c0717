"""What rollouts and their grading need, as a config says: workers, mesh, tokenizer, engine."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from cir_jax import config as configs
from cir_jax import hosts
from cir_jax import mesh as meshes
from cir_jax.config import Config, ConfigError
from cir_jax.reward.score import Grader
from cir_jax.rollout.engine import Engine
from cir_jax.sandbox.store import Replay, Store, open_store
from cir_jax.tokenizer import Tokenizer


@dataclasses.dataclass
class Rollouts:
    mesh: Mesh
    tokenizer: Tokenizer
    sandbox: Store | Replay
    grader: Grader
    engine: Engine


@contextlib.contextmanager
def open_rollouts(cfg: Config, record_dir: Path | None) -> Iterator[Rollouts]:
    """Starts workers and engine; on the way out ends the workers. The mesh is set meanwhile.

    record_dir: where programs are written down, if the config says so; None: nowhere.
    """
    with contextlib.ExitStack() as stack:
        # Workers first: a machine that cannot isolate programs is found out before jax comes up.
        grader = stack.enter_context(Grader(cfg=cfg.reward))
        sandbox = stack.enter_context(open_store(cfg.sandbox, record_dir, hosts.index()))
        hosts.mark("starting the devices")
        if hosts.count() > 1:
            hosts.check_same(
                devices_per_process=jax.local_device_count(), device=jax.devices()[0].device_kind
            )
        mesh = meshes.make_mesh(cfg.mesh)
        stack.enter_context(jax.set_mesh(mesh))
        tokenizer = Tokenizer(configs.asset_dir(cfg.tokenizer))
        if tokenizer.size > cfg.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size={cfg.model.vocab_size}: less than the tokenizer's "
                f"{tokenizer.size}"
            )
        engine = Engine(
            cfg.model,
            cfg.rollout,
            tokenizer,
            sandbox,
            template=cfg.data.template,
            chat=cfg.data.chat,
            max_prompt_tokens=cfg.data.max_prompt_tokens,
            dtype=cfg.compute.dtype,
            seed=cfg.seed,
            mesh=meshes.decoding_mesh(mesh, cfg.mesh),
        )
        yield Rollouts(mesh, tokenizer, sandbox, grader, engine)
