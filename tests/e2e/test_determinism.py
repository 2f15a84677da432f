"""A request's tokens are its own: the same alone and in a crowd, on one thread and on two."""

from pathlib import Path

from baton import Client, LocalCluster
from tests.e2e.corpus import CorpusRequest
from tests.e2e.harness import options, run_alone, run_together

TEMPERATURE = 0.8
ALONE = 8


def test_same_seed_same_tokens(checkpoint_bf16: Path, requests: tuple[CorpusRequest, ...]) -> None:
    by_threads = []
    for threads in (1, 2):
        with LocalCluster(options(checkpoint_bf16, threads=threads)) as cluster:
            together = run_together(cluster.address, requests, temperature=TEMPERATURE)
            with Client(cluster.address) as client:
                alone = [run_alone(client, one, temperature=TEMPERATURE) for one in requests[:ALONE]]
        assert [one.token_ids for one in alone] == [one.token_ids for one in together[:ALONE]]
        assert [one.seed for one in together] == [one.seed for one in requests]
        by_threads.append([one.token_ids for one in together])
    assert by_threads[0] == by_threads[1]
    assert len(set(by_threads[0])) == len(requests)


def test_a_drawn_seed_is_returned_and_replays(client: Client, requests: tuple[CorpusRequest, ...]) -> None:
    prompt = requests[0].prompt
    first, second = (client.generate(prompt, max_tokens=24, ignore_eos=True) for _ in range(2))
    assert first.token_ids != second.token_ids
    again = client.generate(first.prompt_token_ids, max_tokens=24, ignore_eos=True, seed=first.seed)
    assert again.token_ids == first.token_ids
    assert again.text == first.text
