"""``runner.py SCRIPT ARGUMENTS``: loads a script, then calls its functions as lines of JSON on stdin say."""

import json
import runpy
import sys
import traceback
from typing import Any


def main() -> None:
    """Serve calls until stdin ends."""
    del sys.argv[0]
    answers, sys.stdout = sys.stdout, sys.stderr  # what the script prints is not an answer
    functions = runpy.run_path(sys.argv[0])
    for line in sys.stdin:
        name, arguments = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"result": functions[name](**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
