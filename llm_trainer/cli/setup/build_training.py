"""From the settings of a command to everything that a training needs: checkpoint, data, model, resolved run.

The order matters. The checkpoint comes first, since a resumed run brings its own settings. Complete settings
say which data; the data say the vocabulary of a new model; the model says the context. After this nothing is
resolved again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.setup.build_dataset import (
    RunData,
    check_data_flags,
    find_data,
    with_chat_template,
    with_domain_data,
    with_model_tokenizer,
)
from llm_trainer.cli.setup.build_model import (
    check_adapter_has_base,
    check_domain_adapters,
    check_same_tokenizer,
    corpus_names,
    is_pretrained,
    load_matching_weights,
    load_pretrained_model,
    read_generation_defaults,
    resolve_model_config,
    unused_vocabulary,
)
from llm_trainer.cli.setup.parse_command import print_line
from llm_trainer.cli.setup.resume_config import merge_saved_config

if TYPE_CHECKING:
    from rich.console import Console

    from llm_trainer.config import RunConfig
    from llm_trainer.config.parse.command import LoadedRun
    from llm_trainer.config.resolve.settings import ResolvedSettings
    from llm_trainer.distributed.process_group import ProcessGroup
    from llm_trainer.model.hf.generation_config import GenerationDefaults
    from llm_trainer.model.transformer import Transformer
    from llm_trainer.training.resolve_run import ResolvedRun


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that a Trainer takes.

    Attributes:
        run: The resolved run.
        model: The model to train.
        data: The opened data and its folder.
    """

    run: ResolvedRun
    model: Transformer
    data: RunData


def build_training(
    loaded: LoadedRun,
    console: Console,
    process_group: ProcessGroup,
    fallbacks: Sequence[str] = (),
    prepare: Callable[[RunConfig], RunConfig] | None = None,
) -> TrainingSetup:
    """Resolve a command's settings and open what they name. A collective call.

    Args:
        loaded: The command line.
        console: Where to print.
        process_group: The ranks that train together.
        fallbacks: Prepared folders to use where no data is named; the first that exists is taken.
        prepare: Called with the complete settings, unless a run is resumed, before the data are opened; it
            may
            prepare data and returns the settings that name them.

    Returns:
        The parts of a training.

    Raises:
        UsageError: For settings that do not fit together.
        DataError: For data that cannot be used.
        CheckpointError: For a checkpoint that does not exist or is damaged.
    """
    from llm_trainer.training.logging.metrics import check_wandb_login
    from llm_trainer.training.resolve_run import resolve_run
    from llm_trainer.training.run_lock import check_not_locked

    check_data_flags(loaded)
    check_adapter_has_base(loaded.config.training)
    settings, checkpoint = _resolve_settings(loaded, process_group, console)
    run_dir = Path(settings.config.training.output_dir)
    process_group.run_on_main(lambda: check_not_locked(run_dir))
    process_group.run_on_main(lambda: check_wandb_login(settings.config.training.report_to))
    process_group = replace(process_group, plan=settings.plan)

    def open_parts() -> tuple[RunConfig, Transformer, RunData, GenerationDefaults]:
        return _open_parts(loaded, settings, checkpoint, console, fallbacks, prepare)

    config, model, data, generation = process_group.main_process_first(open_parts)
    run = resolve_run(
        replace(settings, config=config),
        data.prepared.train,
        context=model.config.max_position_embeddings,
        tokenizer=data.prepared.tokenizer,
        checkpoint=checkpoint,
        process_group=process_group,
        console=console,
        generation=generation,
    )
    return TrainingSetup(run, model, data)


def _resolve_settings(
    loaded: LoadedRun, process_group: ProcessGroup, console: Console
) -> tuple[ResolvedSettings, Path | None]:
    """The complete settings, and the verified checkpoint to resume from."""
    from llm_trainer.training.checkpoint.resume import find_checkpoint

    given = loaded.config.training
    training, checkpoint = find_checkpoint(given, process_group, lambda line: print_line(console, line))
    if training is not given:  # a remote address became a local folder
        loaded.config = loaded.config.model_copy(update={"training": training})
        if loaded.settings is not None:
            loaded.settings = replace(loaded.settings, config=loaded.config)
    if loaded.settings is None:
        loaded.resolve(None if checkpoint is None else merge_saved_config(loaded, checkpoint))
    assert loaded.settings is not None
    return loaded.settings, checkpoint


def _open_parts(
    loaded: LoadedRun,
    settings: ResolvedSettings,
    checkpoint: Path | None,
    console: Console,
    fallbacks: Sequence[str],
    prepare: Callable[[RunConfig], RunConfig] | None,
) -> tuple[RunConfig, Transformer, RunData, GenerationDefaults]:
    """The settings with what the data and the model have settled, these two, and what the base model says
    about generation.
    """
    from llm_trainer.data.prepared_dataset import check_vocabulary
    from llm_trainer.model.build import build_model
    from llm_trainer.model.hf.generation_config import GenerationDefaults

    config, is_new = settings.config, checkpoint is None
    if prepare is not None and is_new:
        config = prepare(config)
    training = config.training
    starts_from_weights = is_pretrained(training.init_from) and is_new
    data_config = config.data
    if starts_from_weights:
        data_config = with_model_tokenizer(data_config, training.init_from)
    data_config = with_domain_data(data_config, training)
    data = find_data(data_config, console, fallbacks)
    corpora = corpus_names(data.prepared)
    generation = GenerationDefaults()
    if not is_new:
        model = build_model(config.model, training.seed)  # the checkpoint's weights replace these
    elif starts_from_weights:
        model = load_pretrained_model(training.init_from, config.model, corpora, training.adapter_from)
        check_same_tokenizer(training.init_from, data.prepared.tokenizer)
        generation = read_generation_defaults(training.init_from)
    else:
        shape = resolve_model_config(config.model, data.prepared, loaded.origins)
        if (line := unused_vocabulary(shape, data.prepared.vocab_size)) is not None:
            print_line(console, line)
        model = build_model(shape, training.seed)
    if training.transfer_from is not None and is_new:
        for line in load_matching_weights(model, training.transfer_from, training.transfer_modules):
            print_line(console, line)
    check_domain_adapters(model.config, training, corpora)
    for tokens in (data.prepared.train, data.prepared.validation):
        if tokens is not None:
            check_vocabulary(tokens, model.config.vocab_size)
    if starts_from_weights or checkpoint is not None:
        data = with_chat_template(data, training.init_from if checkpoint is None else str(checkpoint))
    return config.model_copy(update={"model": model.config, "data": data.config}), model, data, generation
