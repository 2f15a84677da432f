"""tritonclient with TLS and a token."""

from pathlib import Path

from baton import Credentials, LocalCluster
from baton.checkpoints import TINY_PYTHON
from baton.keys import KeyDirectory
from tests.e2e.harness import options
from tests.foreign import ForeignScript


def test_tls_and_tokens(tmp_path: Path, triton: ForeignScript) -> None:
    keys = tmp_path / "keys"
    made = KeyDirectory(keys)
    made.server(["127.0.0.1"], days=1)
    made.tenant("acme")
    token = (keys / "token-acme").read_text().strip()
    files = {"--tls-cert": "server.crt", "--tls-key": "server.key", "--tokens": "tokens"}
    flags = [part for flag, name in files.items() for part in (flag, str(keys / name))]
    credentials = Credentials(ca=keys / "ca.crt", token=token)
    with LocalCluster(options(TINY_PYTHON, scheduler_arguments=flags, credentials=credentials)) as cluster:
        asked = {"address": cluster.address, "authority": str(keys / "ca.crt"), "model": "tiny_python", "text": "def "}
        assert triton.call("protected", **asked, headers={}) == "StatusCode.UNAUTHENTICATED"
        (text,) = triton.call("protected", **asked, headers={"authorization": f"Bearer {token}"})
        assert text.startswith("def ")
