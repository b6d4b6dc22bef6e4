"""The clients, with the versions that are installed for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Client:
    """A client, or several that share an environment.

    Args:
        name: its name for ``--only``, and of its environment's folder.
        script: its script in this folder: ``.py``, ``.mjs``, or ``.sh`` for a program.
        packages: the requirements, as pip or npm read them. The first one gives the version.
        heavy: whether it is left out unless named, since it needs gigabytes.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    heavy: bool = False

    @property
    def needs_node(self) -> bool:
        """Whether npm installs the client."""
        return self.script.startswith("js_")


CLIENTS = (
    Client("openai", "py_openai.py", ("openai==3.57.0", "aiohttp==3.14.5")),
    Client("litellm", "py_litellm.py", ("litellm==1.108.7",)),
    Client("litellm-proxy", "py_litellm_proxy.py", ("litellm[proxy]==1.108.7",)),
    Client(
        "langchain", "py_langchain.py", ("langchain-openai==1.7.4", "langchain-community==0.4.2")
    ),
    Client("llamaindex", "py_llamaindex.py", ("llama-index-llms-openai-like==0.8.1",)),
    Client("pydantic-ai", "py_pydantic_ai.py", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client("instructor", "py_instructor.py", ("instructor==1.17.0",)),
    Client("haystack", "py_haystack.py", ("haystack-ai==3.4.1",)),
    Client("semantic-kernel", "py_semantic_kernel.py", ("semantic-kernel==1.45.0",)),
    Client("aisuite", "py_aisuite.py", ("aisuite[openai]==0.2.0", "openai==1.109.1")),
    Client("llm", "py_llm.py", ("llm==0.36",)),
    Client("gradio", "py_gradio.py", ("gradio==6.31.0", "openai==3.57.0")),
    Client("openai-agents", "py_openai_agents.py", ("openai-agents==0.24.0",)),
    Client("smolagents", "py_smolagents.py", ("smolagents[openai]==1.26.0",)),
    Client("autogen", "py_autogen.py", ("autogen-ext[openai]==0.7.5", "autogen-agentchat==0.7.5")),
    Client("strands", "py_strands.py", ("strands-agents[openai]==1.62.0",)),
    Client("agno", "py_agno.py", ("agno==3.1.10", "openai==3.57.0")),
    Client("openai-js", "js_openai.mjs", ("openai@6.49.0",)),
    Client(
        "langchain-js", "js_langchain.mjs", ("@langchain/openai@1.5.8", "@langchain/core@1.4.0")
    ),
    Client(
        "ai-sdk",
        "js_ai_sdk.mjs",
        ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92", "@ai-sdk/openai@3.0.141"),
    ),
    Client("promptfoo", "js_promptfoo.mjs", ("promptfoo@0.121.20",), heavy=True),
    Client("open-webui", "py_open_webui.py", ("open-webui==0.12.4",), heavy=True),
)
