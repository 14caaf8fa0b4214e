"""Where the files of the GLUE tasks and of SQuAD v2.0 come from. `moe_lab.datasets.registry` takes them in.

Every checksum and size was found in the `datasets` library: the last versions of datasets/glue/dataset_infos.json and
datasets/squad_v2/dataset_infos.json in its repository, which recorded sha256 and bytes of each of these URLs. SST-2 is
in the registry itself, since `load` knows it, too.
"""

from __future__ import annotations

from moe_lab.datasets.sources import Entry, RemoteFile, Source

_GLUE_DATA = "https://dl.fbaipublicfiles.com/glue/data/"
_SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/"
_SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/"
_GLUE_PAPER = "A. Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform, ICLR 2019"
_FOUND_IN = "the `datasets` library, datasets/glue/dataset_infos.json"
_USED_FOR = "COMET-BERT, profile paper"


def _glue(name: str, sha256: str, size: int) -> tuple[RemoteFile]:
    return (RemoteFile(name, (_GLUE_DATA + name,), f"sha256:{sha256}", size),)


def _squad(part: str, sha256: str, size: int) -> RemoteFile:
    name = f"{part}-v2.0.json"
    return RemoteFile(f"squad-v2/{name}", (f"{_SQUAD}dataset/{name}",), f"sha256:{sha256}", size)


GLUE_SOURCES: dict[str, Source] = {
    "cola": Source(
        "CoLA, as in GLUE",
        f"A. Warstadt, A. Singh, S. R. Bowman, Neural Network Acceptability Judgments, TACL 7, 2019; {_GLUE_PAPER}",
        "no licence: copyright stays with the authors of the quoted sentences, research held to be fair use (the page)",
        "https://nyu-mll.github.io/CoLA/",
        _glue("CoLA.zip", "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff", 376_971),
        _FOUND_IN,
    ),
    "mrpc": Source(
        "MRPC, and GLUE's list of the pairs of its dev set",
        "W. B. Dolan, C. Brockett, Automatically Constructing a Corpus of Sentential Paraphrases, Workshop on "
        f"Paraphrasing 2005; {_GLUE_PAPER}",
        "the Microsoft Research Paraphrase Corpus licence terms (the download page)",
        "https://www.microsoft.com/en-us/download/details.aspx?id=52398",
        (
            RemoteFile(
                "mrpc/msr_paraphrase_train.txt",
                (f"{_SENTEVAL}msr_paraphrase_train.txt",),
                "sha256:60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
                1_047_044,
            ),
            RemoteFile(
                "mrpc/mrpc_dev_ids.tsv",
                (f"{_GLUE_DATA}mrpc_dev_ids.tsv",),
                "sha256:971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
                6_222,
            ),
        ),
        _FOUND_IN,
    ),
    "qqp": Source(
        "Quora Question Pairs, as in GLUE",
        f"S. Iyer, N. Dandekar, K. Csernai, First Quora Dataset Release: Question Pairs, 2017; {_GLUE_PAPER}",
        "Quora's terms of service: non-commercial use (the announcement)",
        "https://quoradata.quora.com/First-Quora-Dataset-Release-Question-Pairs",
        _glue("QQP-clean.zip", "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0", 41_696_084),
        _FOUND_IN,
    ),
    "mnli": Source(
        "MultiNLI, as in GLUE",
        "A. Williams, N. Nangia, S. R. Bowman, A Broad-Coverage Challenge Corpus for Sentence Understanding through "
        f"Inference, NAACL 2018; {_GLUE_PAPER}",
        "free to use: OANC's licence for most texts, CC BY or CC BY-SA for some of the fiction (the paper, section 2)",
        "https://cims.nyu.edu/~sbowman/multinli/",
        _glue("MNLI.zip", "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633", 312_783_507),
        _FOUND_IN,
    ),
    "qnli": Source(
        "QNLI (version 2), SQuAD made into pairs by GLUE",
        "P. Rajpurkar, J. Zhang, K. Lopyrev, P. Liang, SQuAD: 100,000+ Questions for Machine Comprehension of Text, "
        f"EMNLP 2016; {_GLUE_PAPER}",
        "CC BY-SA 4.0, as SQuAD",
        _SQUAD,
        _glue("QNLIv2.zip", "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5", 10_627_589),
        _FOUND_IN,
    ),
    "rte": Source(
        "RTE 1, 2, 3 and 5, as in GLUE",
        "I. Dagan, O. Glickman, B. Magnini, The PASCAL Recognising Textual Entailment Challenge, MLCW 2005; R. "
        f"Bar-Haim et al. 2006; D. Giampiccolo et al. 2007; L. Bentivogli et al. 2009; {_GLUE_PAPER}",
        "research use (no licence text)",
        "https://aclweb.org/aclwiki/Recognizing_Textual_Entailment",
        _glue("RTE.zip", "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee", 697_150),
        _FOUND_IN,
    ),
    "squad-v2": Source(
        "SQuAD v2.0",
        "P. Rajpurkar, R. Jia, P. Liang, Know What You Don't Know: Unanswerable Questions for SQuAD, ACL 2018",
        "CC BY-SA 4.0",
        _SQUAD,
        (
            _squad("train", "68dcfbb971bd3e96d5b46c7177b16c1a4e7d4bdef19fb204502738552dede002", 42_123_633),
            _squad("dev", "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8", 4_370_528),
        ),
        "the `datasets` library, datasets/squad_v2/dataset_infos.json",
    ),
}

TASKS: dict[str, Entry] = {
    "planted-sentences": Entry("praise or blame of four kinds of things", "COMET-BERT, profile quick"),
    "sst2": Entry("film reviews, positive or negative", "COMET-BERT, profiles standard and paper", ("sst2",)),
    "cola": Entry("is the sentence acceptable English", _USED_FOR, ("cola",)),
    "mrpc": Entry("do two sentences of news say the same", _USED_FOR, ("mrpc",)),
    "qqp": Entry("are two questions the same", _USED_FOR, ("qqp",)),
    "mnli": Entry("does the premise entail or contradict the hypothesis", _USED_FOR, ("mnli",)),
    "qnli": Entry("does the sentence answer the question", _USED_FOR, ("qnli",)),
    "rte": Entry("does one text entail the other", _USED_FOR, ("rte",)),
    "squad-v2": Entry("find the answer in a paragraph, or say that there is none", _USED_FOR, ("squad-v2",)),
}
"""Text tasks: names for `moe_lab.datasets.glue.load_task`; the last one for `moe_lab.datasets.squad.load_squad`."""
