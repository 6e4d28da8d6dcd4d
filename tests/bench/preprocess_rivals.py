"""Programs that tests/bench/preprocess.py runs beside ours, each in a process of its own."""

# Programs of the rivals: input, tokenizer folder, output prefix.
BARE_GIGATOKEN = """
import sys, gigatoken
tokenizer = gigatoken.Tokenizer(sys.argv[2] + "/tokenizer.json")
print(len(tokenizer.encode_files(gigatoken.JsonlFileSource([sys.argv[1]])).layout.content.data))
"""
BARE_TOKENIZERS = """
import json, sys, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
texts, tokens = [], 0
def encode():
    return sum(len(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
for line in open(sys.argv[1], "rb"):
    texts.append(json.loads(line)["text"])
    if len(texts) == 500:
        tokens += encode()
        texts.clear()
print(tokens + encode())
"""
# Megatron-LM's main asks for Python 3.12, of which it needs one name.
WITH_OVERRIDE = """
import runpy, sys, typing
if not hasattr(typing, "override"):
    typing.override = lambda function: function
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
if __name__ == "__main__":
    source, tokenizer, prefix = sys.argv[1:]
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(source),
            MegatronDocumentTokenizer(prefix, tokenizer_name_or_path=tokenizer + "/tokenizer.json",
                                      eos_token="<|endoftext|>"),
        ],
        tasks=2, workers=2, logging_dir=prefix + ".logs", skip_completed=False,
    ).run()
"""

# Output prefix, then the prefixes to merge; without any, only what starting costs.
MERGE = {
    "ours": """
import sys
from tools.preprocess.merge_datasets import merge
if len(sys.argv) > 1:
    merge(sys.argv[2:], sys.argv[1])
""",
    "Megatron's builder": """
import sys, warnings
warnings.simplefilter("ignore")
import megatron_gdn, numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
if len(sys.argv) > 1:
    builder = IndexedDatasetBuilder(sys.argv[1] + ".bin", dtype=numpy.uint16)
    for prefix in sys.argv[2:]:
        builder.add_index(prefix)
    builder.finalize(sys.argv[1] + ".idx")
""",
}
