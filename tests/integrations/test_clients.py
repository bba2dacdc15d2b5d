"""Frameworks' clients, as querit/serve/README.md shows them, against the real server and a folder of a model."""

import pytest

from tests.models_for_tests import folder_of
from tests.querit.serve.readme_for_tests import clients, run_snippet
from tests.querit.serve.serving_for_tests import serving, tiny_ranker

DOCUMENTS = ["Feed the starter with flour.", "The Moon pulls on the water."]
OF_A_SERVER, OF_A_FOLDER = clients("With the clients that you have"), clients("Without a server")


def best():
    return tiny_ranker()("Why does the sea rise?", DOCUMENTS)[0]["document"]


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[::-1]], ids=["in order", "reversed"])
@pytest.mark.parametrize("name", list(OF_A_SERVER))
def test_a_client_of_the_server(name, documents):
    with serving(keys=["secret"]) as client:
        changes = {"ADDRESS": str(client.base_url).rstrip("/"), "KEY": "secret", "DOCUMENTS": documents}
        printed = run_snippet(OF_A_SERVER[name], **changes)
    assert printed and set(printed) == {best()}


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[::-1]], ids=["in order", "reversed"])
@pytest.mark.parametrize("name", list(OF_A_FOLDER))
def test_a_framework_that_loads_the_folder(name, documents):
    changes = {"MODEL": str(folder_of("bert")), "DOCUMENTS": documents}
    assert run_snippet(OF_A_FOLDER[name], **changes) == [best()]


def test_all_of_the_page_are_tried():
    assert len(OF_A_SERVER) == 6 and len(OF_A_FOLDER) == 3
