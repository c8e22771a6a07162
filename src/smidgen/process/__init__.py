"""The process around a technique, one step a file; each is a plain function that the command line calls too.

    recipe      what to do: load_recipe(path, overrides) -> Recipe; run_recipe: what all recipes share
    pretrain    a model that learns from text alone: prepare(recipe) -> Pretraining, run(it) -> metrics
    inspection  what to look at in them before training: inspect_data(job) -> Inspection
    data        the examples: load_data(config, task) -> TaskData
    encoding    their tokens: encode(examples, task, tokenizer, max_length=..., template=...)
    batches     which of them make up a step, on every process
    job         a recipe made ready: prepare(recipe) -> Job; a finished run again: reopen(folder) -> Job
    identification  which layers have something to gain: identify(recipe), and the ranks that a budget buys
    plan        what would be trained, and what it would cost
    train       one adapter, resumable bit for bit
    run         a job from its first step to its files: run(job) -> metrics
    onednn      fp32 products by the faster of two libraries, where it is as exact
    evaluate    its scores on a split
    contrast    two runs on the same rows: contrast(first, second, margin=...) -> Contrast
    predict     its answers to new rows
    merge       the model with the adapter in its weights
    compare     all of it for several techniques; runs has each in a process of its own

Import a step from its module, `from smidgen.process.recipe import load_recipe`: this package imports nothing by itself,
since most steps need torch.
"""
