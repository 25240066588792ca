"""An HTTP server that clients of OpenAI's API speak to: ``python -m engine serve``.

This room turns requests of HTTP into requests of ``AsyncLLM``, and what comes of them into JSON. It never plans a step,
and never logs what a client has sent, was answered, or proves itself by.

    server_options  ServerOptions: what a user may set, and its flags
    http_server     the socket, the loop, the signals: one run of the server
    connection      what one client's connection may cost: its time, its bytes, its number
    front           what holds for every request: its id, its key, its line in the log, its error's body
    endpoints       what the server answers at each path
    live_view       every page of the pool, live
    service         what all requests share: the engine, its name, its template, whether it is stopping
    api_keys        who may call, and whose cached prefixes they share
    bodies          the bodies of requests, checked, as sampling parameters
    chat_template   a checkpoint's template: messages become one text
    choices         the answers to one request of the API, to one prompt or several
    answer_json     answers as JSON, whole or in pieces
    logprob_json    log-probabilities as JSON
    safe_log        the log, which has no word of a client
    event_stream    an answer sent piece by piece, until the end or until its reader goes
    api_error       errors as clients of the API know them

Nothing is exported here, so that the options can be listed without the packages of the extra ``serve``.
"""
