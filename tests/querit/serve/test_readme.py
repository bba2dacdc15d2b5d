"""What querit/serve/README.md shows is so; the clients that are not installed here run in tests/integrations."""

import dataclasses
import json
import re
import subprocess

from typer.main import get_command

from querit import cli
from querit.serve.admission import Limits
from tests.querit.serve.readme_for_tests import README, clients, run_snippet, snippets
from tests.querit.serve.serving_for_tests import serving, tiny_ranker

SECTION = "With the clients that you have"
DOCUMENTS = ["Feed the starter with flour.", "The Moon pulls on the water."]


def best():
    return tiny_ranker()("Why does the sea rise?", DOCUMENTS)[0]["document"]


def test_coheres_client_and_curl():
    with serving(keys=["any"]) as client:
        address = str(client.base_url)
        assert run_snippet(clients(SECTION)["Cohere's client"], ADDRESS=address) == [best()]
    with serving() as client:
        (command,) = snippets("bash", SECTION).values()
        command = command.replace("http://127.0.0.1:8000", str(client.base_url)).replace(
            "curl", "curl -s --noproxy '*'"
        )
        answer = subprocess.run(["sh", "-c", command], capture_output=True, check=True)
    assert json.loads(answer.stdout)["results"][0]["document"]["text"] == best()


def test_the_table_of_limits_is_the_defaults():
    text = README.read_text(encoding="utf-8")
    limits = dataclasses.asdict(Limits())
    numbers = [int(number.replace(",", "")) for number in re.findall(r"^\| ([\d,]+)", text, re.M)]
    assert numbers == [limits["documents"], limits["body_bytes"] // 10**6, limits["waiting"], limits["seconds"]]
    defaults = {option: p.default for p in get_command(cli.app).commands["serve"].params for option in p.opts}
    assert {option for option in re.findall(r"`(--[\w-]+)`", text) if option != "--to"} <= defaults.keys()
    for name, value in limits.items():
        option = {"seconds": "timeout"}.get(name, f"max-{name.replace('_', '-')}")
        assert defaults[f"--{option}"] == value
