"""Peak memory of indexing does not follow the corpus: corpora of growing size, each indexed in a fresh process.

python benchmarks/memory.py [--sizes 500 2000 8000]
python benchmarks/memory.py --sizes 2000 --side 64 --codec float16 1-bit    R_train at the paper's side
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from measurement import save
from trackstar.choices import CODECS, CodecName

BATCH_TOKENS = 1024


def index_once(count: int, side: int, codec: CodecName) -> None:
    """In the child: index `count` synthetic sentences and print what memory it took, in MiB."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from trackstar.indexing.build import build_index
    from trackstar.model.language_model import wrap_model

    torch.manual_seed(0)
    words = [f"w{number}" for number in range(1000)]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]  # stubs: no setter
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4, vocab_size=1000
    )
    model = wrap_model(LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=backend))
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        with corpus.open("w", encoding="utf-8") as file:
            for _ in range(count):
                text = " ".join(generator.choice(words, size=int(generator.integers(10, 60))))
                file.write(json.dumps({"text": text}) + "\n")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        build_index(
            model, str(corpus), Path(folder) / "index", side=side, codec=codec, second_moment_examples=64,
            shard_examples=256, batch_tokens=BATCH_TOKENS, progress=False,
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"examples": count, "codec": codec, "before_mib": before // 1024, "peak_mib": after // 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[500, 2000, 8000])
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--codec", nargs="*", choices=CODECS, default=["float16"])
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        index_once(arguments.sizes[0], arguments.side, arguments.codec[0])
        return
    figures = []
    for codec in arguments.codec:
        for size in arguments.sizes:
            command = [sys.executable, __file__, "--child", "--sizes", str(size), "--side", str(arguments.side)]
            result = subprocess.run([*command, "--codec", codec], capture_output=True, text=True, check=True)
            figures.append(json.loads(result.stdout.splitlines()[-1]))
            print(figures[-1], flush=True)
    save(
        "memory-cpu" if arguments.side == 32 else f"memory-side-{arguments.side}-cpu",
        {
            "side": arguments.side,
            "batch_tokens": BATCH_TOKENS,
            "r_train_mib": 16 * arguments.side**4 * 4 / 2**20,
            "runs": figures,
            "peak_growth_mib": figures[-1]["peak_mib"] - figures[0]["peak_mib"],
        },
    )


if __name__ == "__main__":
    main()
