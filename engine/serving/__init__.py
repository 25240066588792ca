"""A compact continuous-batching engine: the proof that the subsystem embeds.

This room takes requests, plans steps, sends them to the device and books what comes back. It never indexes into a
buffer, and no kernel knows of its requests.

    llm             LLM: prompts in, tokens out
    sampling_params  SamplingParams: how the tokens of a request are chosen
    request         a request and its states; RequestOutput
    intake          checks prompts and makes requests of them
    plan/           which requests run in a step; no jax
    device/         what a step sends to the device, and what runs there
    stepper         the loop: plan, make page moves, dispatch, commit
    groups          several answers to one prompt
    reports         finished requests as answers for the caller
    recovery        what becomes of an engine in which a step has failed
    interrupts      Ctrl-C waits until a change of the engine is whole
    gate            one thread drives the engine; others read between its steps
    watch/          metrics
    build, loading  make an engine's parts from its configuration; load its model
    compile_cache   where XLA keeps compiled programs
    check           answers against the dense model

Nothing is exported here, so that ``plan/`` loads without jax: ``LLM`` is ``engine.LLM``.
"""
