"""What a request may ask for, from an api process's frames to its frames, over real sockets."""

import numpy as np

from baton_protos import engine_pb2 as pb
from baton_protos.columns import INT64, pack
from baton_protos.execution_pb2 import RowSampling
from scheduler_service.api import wire
from scheduler_service.api.messages import Outcome, Outputs, Submission, TokenLogprob
from scheduler_service.api.messages import RowSampling as ApiSampling
from scheduler_service.engine.api_wire import Submit, decode, decode_sampling
from tests.engine.rig import CAPACITY, VOCAB, Api, Engine
from tests.fakes.shadow_executor import Logprob, answer
from tests.fakes.shadow_link import ShadowLink

EVERYTHING = ApiSampling(
    temperature=0.5,
    top_k=7,
    top_p=0.25,
    min_p=0.125,
    repetition_penalty=1.5,
    frequency_penalty=-0.5,
    presence_penalty=0.75,
    seed=2**64 - 1,
    logit_bias=((3, -100.0), (5, 1.5)),
    allowed_token_ids=(1, 2, 3),
    banned_token_ids=(9,),
    min_tokens=4,
    stop_token_ids=(2, 0),
    grammar="start: /a/",
    num_logprobs=0,
    processed_logprobs=True,
    num_prompt_logprobs=3,
)


def submitted(sampling: ApiSampling) -> Submit:
    """What the engine understands of a submission."""
    submission = Submission(1, np.array([1, 2], np.int32), 5, sampling, (7, 8), b"s" * 32, -3, 250)
    message = decode(wire.encode_submit(submission))
    assert isinstance(message, Submit)
    return message


def outputs_of(api: Api) -> list[Outputs]:
    """The batches as an api process has them."""
    found = []
    for batch in api.batches:
        message = wire.decode(pb.FromEngine(outputs=batch).SerializeToString())
        assert isinstance(message, Outputs)
        found.append(message)
    return found


def plain(entry: TokenLogprob) -> Logprob:
    return Logprob(entry.logprob, entry.rank, tuple(zip(entry.top_token_ids, entry.top_logprobs, strict=True)))


def test_a_submission_reaches_the_core_whole() -> None:
    submit = submitted(EVERYTHING)
    assert submit.output_token_ids.tolist() == [7, 8]
    assert (submit.cache_salt, submit.priority, submit.queue_timeout) == (b"s" * 32, -3, 0.25)
    sampling = submit.sampling
    assert (sampling.seed, sampling.stop_token_ids, sampling.min_tokens) == (2**64 - 1, (2, 0), 4)
    assert (sampling.num_logprobs, sampling.num_prompt_logprobs, sampling.needs_log) == (0, 3, True)


def test_an_executor_gets_what_the_api_process_said() -> None:
    sampling = submitted(EVERYTHING).sampling
    row = RowSampling.FromString(sampling.encoded)
    assert (row.temperature, row.min_p, row.repetition_penalty, row.grammar) == (0.5, 0.125, 1.5, "start: /a/")
    assert (row.bias_token_ids, row.num_logprobs, row.HasField("num_logprobs")) == (pack([3, 5]), 0, True)
    assert decode_sampling(row) == sampling


def test_parameters_that_need_no_log_get_none() -> None:
    for sampling, needs_log in (
        (ApiSampling(min_tokens=3, num_logprobs=5, logit_bias=((1, 2.0),)), False),
        (ApiSampling(repetition_penalty=1.0, temperature=0.5), False),
        (ApiSampling(repetition_penalty=1.1), True),
        (ApiSampling(presence_penalty=-1.0), True),
        (ApiSampling(grammar="x"), True),
        (ApiSampling(num_prompt_logprobs=0), True),
    ):
        assert submitted(sampling).sampling.needs_log == needs_log


def test_log_probabilities_of_output_and_prompt(engine: Engine, api: Api) -> None:
    link = ShadowLink(engine.executor_endpoint, "e", CAPACITY)
    link.start()
    other = Api(engine.api_endpoint, b"api-1")
    for one in (api, other):
        one.wait(lambda one=one: one.limits.ready_executors == 1)
    prompts = {handle: [1 + handle] * 3 + list(range(70)) for handle in range(6)}
    rows = {
        handle: RowSampling(
            seed=handle,
            num_logprobs=handle % 3 if handle % 2 else None,
            num_prompt_logprobs=2 if handle % 3 == 0 else None,
        )
        for handle in prompts
    }
    for handle, prompt in prompts.items():
        (other if handle == 5 else api).submit_row(handle, prompt, 9, rows[handle])
    api.wait(lambda: len(api.ends) == 5)
    other.wait(lambda: other.ends)
    for handle, prompt in prompts.items():
        expected = answer(prompt, 9, decode_sampling(rows[handle]), VOCAB)
        mine = other if handle == 5 else api
        assert mine.outputs[handle] == expected.token_ids
        logprobs: list[Logprob] = []
        prompt_logprobs: list[Logprob] = []
        for batch in outputs_of(mine):
            for item in batch.prompt_logprobs:
                if item.handle == handle:
                    assert item.start_position == 1 + len(prompt_logprobs) and not logprobs
                    prompt_logprobs += [plain(entry) for entry in item.logprobs]
            logprobs += [plain(entry) for index, entry in batch.logprobs.items() if batch.handles[index] == handle]
        assert logprobs == expected.logprobs
        assert prompt_logprobs == expected.prompt_logprobs
    other.close()
    link.stop()
    assert link.error is None


def test_held_requests_stand_still_until_released(engine: Engine, api: Api) -> None:
    link = ShadowLink(engine.executor_endpoint, "e", CAPACITY, step_seconds=0.002)
    link.start()
    api.wait(lambda: api.limits.ready_executors == 1)
    for handle in (0, 1):
        api.submit(handle, [1 + handle, 2], 100, handle, [])
    api.wait(lambda: api.outputs[0])
    api.send(hold=pb.Hold(held=pack([0], INT64)))
    api.wait(lambda: 1 in api.ends)
    assert 0 not in api.ends and len(api.outputs[0]) < 100
    api.send(hold=pb.Hold(released=pack([0], INT64)))
    api.wait(lambda: 0 in api.ends)
    assert api.outputs[0] == answer([1, 2], 100, decode_sampling(RowSampling(seed=0)), VOCAB).token_ids
    link.stop()


def test_a_resumed_stream_goes_on(engine: Engine, api: Api) -> None:
    link = ShadowLink(engine.executor_endpoint, "e", CAPACITY)
    link.start()
    api.wait(lambda: api.limits.ready_executors == 1)
    whole = answer([1, 2], 30, decode_sampling(RowSampling(seed=4)), VOCAB).token_ids
    api.submit(0, [1, 2], 30, 4, [], output_token_ids=pack(whole[:12]))
    api.wait(lambda: api.ends)
    assert api.outputs[0] == whole[12:]
    assert api.finished[0].outcome == pb.OUTCOME_LENGTH
    assert api.finished[0].queue_us > 0
    link.stop()


def test_a_request_that_cannot_start_in_time_fails_soon(engine: Engine, api: Api) -> None:
    link = ShadowLink(engine.executor_endpoint, "e", CAPACITY)
    link.start()
    api.wait(lambda: api.limits.ready_executors == 1)
    link.stop()
    api.wait(lambda: api.limits.ready_executors == 0)
    api.submit(0, [1, 2], 30, 4, [], queue_timeout_ms=100)
    api.wait(lambda: api.ends, timeout=20)
    assert api.ends[0] == pb.OUTCOME_UNAVAILABLE


def test_an_end_says_all_it_knows() -> None:
    finished = pb.FinishedRequest(
        handle=3, outcome=pb.OUTCOME_STOP, cached_tokens=1, queue_us=5, stop_token_id=9, executor_losses=2
    )
    batch = pb.OutputBatch(finished=[finished], best_effort_handles=pack([4], INT64))
    outputs = wire.decode(pb.FromEngine(outputs=batch).SerializeToString())
    assert isinstance(outputs, Outputs)
    handle, end = outputs.finished[0]
    assert (handle, end.outcome, end.queue_us, end.stop_token_id, end.executor_losses) == (3, Outcome.STOP, 5, 9, 2)
    assert outputs.best_effort_handles == [4]
