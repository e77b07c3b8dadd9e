"""What the site shows besides docs/: the README as its first page, the model cards with their figures and recipes, and
how to contribute.

Pages link to these files as they lie in the repository, one folder up, so that the links also work if Markdown is read
without the site. Here the files become part of the site, and the links follow.

The reference is read from source and nothing is imported for it. `FieldsOfDataclasses` adds what the source hides.
"""

import ast
import re
from pathlib import Path

from griffe import Extension, Function, Parameter, ParameterKind, Parameters
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
SHOWN = ("model_cards/*/*.md", "model_cards/*/*.png", "model_cards/*/*.yaml", "CONTRIBUTING.md")


def on_files(files, config):
    """Add the pages and figures that do not lie in docs/."""
    readme = re.sub(r"\[(.*?)\]\((LICENSE|CITATION.cff)\)", r"\1", (ROOT / "README.md").read_text())  # not on the site
    readme = readme.replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for path in sorted(path for pattern in SHOWN for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Correct the links of docs/*.md that go one folder up."""
    is_ours = page.file.src_dir == config.docs_dir and "/" not in page.file.src_uri
    return markdown.replace("](../", "](") if is_ours else markdown


class FieldsOfDataclasses(Extension):
    """Describes what exists only after import: constructors of configurations, flags of dataclasses."""

    def on_class_members(self, *, node, cls, **kwargs):
        """Make parameters of fields, and descriptions of help texts."""
        if cls.name.endswith("Config"):  # Transformers makes each of them a dataclass
            cls.set_member("__init__", Function("__init__", parameters=Parameters(*_fields(cls))))
        flags = "".join(f"    {name}: {text}\n" for name, text in _help_texts(node))
        if flags:
            cls.docstring.value += f"\n\nArgs:\n{flags}"


def _fields(cls):
    for name, field in cls.attributes.items():
        if field.annotation is not None:
            yield Parameter(name, annotation=field.annotation, kind=ParameterKind.keyword_only, default=field.value)


def _help_texts(node):
    """Name and text of every `name: kind = field(..., metadata={"help": text})`."""
    for statement in node.body:
        for argument in getattr(getattr(statement, "value", None), "keywords", ()):
            if argument.arg == "metadata":
                texts = dict(zip(map(ast.literal_eval, argument.value.keys), argument.value.values, strict=True))
                yield statement.target.id, ast.literal_eval(texts["help"])
