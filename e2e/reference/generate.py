"""Makes reference outputs for a GGUF model with transformers in float32 on the CPU.

The weights are dequantised to float32 by the `gguf` package and run by transformers: no code of this project
takes part, so that agreement means something. Greedy decoding goes through the key-value cache; a second pass
over the whole sequence at once, without a cache, has to give the same ids and margins, else nothing is
written.
"""

import argparse
import hashlib
import json
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # everything comes from the one file that is named on the command line

import torch
import transformers
from prompts import OF_ARCHITECTURE
from tokenizers import normalizers, pre_tokenizers

NEW_TOKENS = 48
TOP = 8
# Below this distance between the best and the second logit two correct engines may choose differently.
CLEAR_MARGIN = 1e-3
# The two orders of summation (cached, whole) differ by rounding only; measured: below 6e-5.
AGREEMENT = 1e-3


class Reference:
    """One model and its tokenizer."""

    def __init__(self, gguf: pathlib.Path):
        place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
        self.architecture = self.model.config.model_type
        self.end_ids = {self.tokenizer.eos_token_id}
        self.begin: list[int] = []
        {"llama": self._smollm2, "qwen2": self._qwen2, "gemma3_text": self._gemma3}[self.architecture]()
        self.worst = 0.0

    def _smollm2(self) -> None:
        # transformers does not read the file's `tokenizer.ggml.pre` (`smollm`) and splits as GPT-2 does: "
        # 12" would become two blanks instead of the one token that the model was trained with. Digits are
        # split off first.
        self.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        if self.ids("a  12") != self.tokenizer.convert_tokens_to_ids(["a", "ĠĠ", "1", "2"]):
            sys.exit("the tokenizer does not split digits off: not the model's own splitting")

    def _qwen2(self) -> None:
        # transformers' own Qwen2 tokenizer composes characters first, and the one that it makes from a GGUF
        # file does not. The generation settings that the model was published with end at the end of a
        # document as well.
        self.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        self.end_ids.add(self.tokenizer.convert_tokens_to_ids("<|endoftext|>"))

    def _gemma3(self) -> None:
        # The file asks for the begin token before every text, and the model answers nonsense without it.
        self.begin = [self.tokenizer.bos_token_id]

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with nothing added but a begin token that the file asks for."""
        return self.begin + self.tokenizer(prompt, add_special_tokens=False).input_ids

    @torch.inference_mode()
    def case(self, prompt: str) -> dict:
        """The whole entry of one prompt."""
        ids = self.ids(prompt)
        cache = transformers.DynamicCache(config=self.model.config)
        step, greedy, margins, first = torch.tensor([ids]), [], [], None
        while len(greedy) < NEW_TOKENS and (not greedy or greedy[-1] not in self.end_ids):
            logits = self.model(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            best = torch.topk(logits, TOP)
            first = first or best
            greedy.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            step = torch.tensor([[greedy[-1]]])
        self._check_uncached(ids, greedy, margins)
        text = greedy[:-1] if greedy[-1] in self.end_ids else greedy
        return {
            "prompt": prompt,
            "ids": ids,
            "top_ids": first.indices.tolist(),
            "top_logits": [round(value, 6) for value in first.values.tolist()],
            "greedy": greedy,
            "margins": [float(f"{margin:.9g}") for margin in margins],
            "text": self.tokenizer.decode(text, clean_up_tokenization_spaces=False),
        }

    def _check_uncached(self, ids: list[int], greedy: list[int], margins: list[float]) -> None:
        logits = self.model(torch.tensor([ids + greedy[:-1]]), use_cache=False).logits[0, len(ids) - 1 :]
        best = torch.topk(logits, 2)
        for place, (chosen, margin) in enumerate(zip(greedy, margins, strict=True)):
            other = float(best.values[place, 0] - best.values[place, 1])
            same = int(best.indices[place, 0]) == chosen or margin < CLEAR_MARGIN
            self.worst = max(self.worst, abs(other - margin))
            if not same or abs(other - margin) > AGREEMENT:
                sys.exit(
                    f"token {place}: {chosen} with margin {margin} cached, {other} uncached: not a reference"
                )


def compare(kept: dict, made: dict) -> None:
    """Ends the program unless a stored case agrees with what this machine computes."""
    clear = next(
        (i for i, margin in enumerate(kept["margins"]) if margin < CLEAR_MARGIN), len(kept["greedy"])
    )
    if kept["ids"] != made["ids"] or kept["greedy"][:clear] != made["greedy"][:clear]:
        sys.exit(f"the kept case {kept['prompt']!r} does not agree with this run")
    worst = max(abs(a - b) for a, b in zip(kept["margins"][:clear], made["margins"][:clear], strict=True))
    if worst > AGREEMENT:
        sys.exit(f"the kept case {kept['prompt']!r} has margins that differ by {worst}")
    print(f"kept    {kept['prompt'][:40]!r}: agrees up to token {clear}, margins within {worst:.1e}")


def main() -> None:
    """Checks the cases that the output file has and the list does not, then makes those of the list."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--gguf", type=pathlib.Path, required=True, help="the model's file")
    options.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file to write")
    options.add_argument("--threads", type=int, default=1, help="threads for torch (default 1)")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    torch.use_deterministic_algorithms(True)

    reference = Reference(given.gguf)
    prompts = OF_ARCHITECTURE[reference.architecture]
    before = json.loads(given.out.read_text())["cases"] if given.out.exists() else []
    cases = [case for case in before if case["prompt"] not in prompts]
    for case in cases:
        compare(case, reference.case(case["prompt"]))
    for prompt in prompts:
        case = reference.case(prompt)
        cases.append(case)
        unclear = next((str(i) for i, m in enumerate(case["margins"]) if m < CLEAR_MARGIN), "none")
        print(
            f"made    {prompt[:40]!r}: {len(case['ids'])} ids, {len(case['greedy'])} new, "
            f"smallest margin {min(case['margins']):.5f}, first unclear: {unclear}, {case['text'][:60]!r}"
        )
    print(f"margins with and without the cache differ by at most {reference.worst:.1e}")
    digest = hashlib.sha256(given.gguf.read_bytes()).hexdigest()
    made_with = (
        f"transformers {transformers.__version__}, torch {torch.__version__}, float32 on the dequantised "
        f"GGUF with sha256 {digest}; margin = top logit minus second; greedy includes the end id when "
        "produced, text does not; recipe: e2e/reference"
    )
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    given.out.write_text(f'{{"made_with": {json.dumps(made_with)},\n"cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
