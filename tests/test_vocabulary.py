"""Members with different tokens given the same: every row against the row of the token it stands for."""

import json

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from hf_zoo.axes import SavedModel
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.configs import changed_config
from hf_zoo.errors import MergeError
from hf_zoo.tokenizer_files import TokenizerContent, read_tokenizer
from hf_zoo.vocabulary import align_vocabularies

BODY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
EMBEDDINGS = "model.embed_tokens.weight"


def word_piece(words, lowercase=True):
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


def bpe(merges, special=("<s>", "</s>")):
    letters = [*special, *"abcdeĠ"]
    vocab = {token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def unigram(pieces, on_top=()):
    vocab = [("<pad>", 0.0), ("<unk>", 0.0), *pieces]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", *on_top])
    return tokenizer


def save(folder, tokenizer, seed, *, rows=None, dtype=torch.float32, name="LlamaForCausalLM", **fields):
    """Save a tiny model whose rows are all different, with a tokenizer."""
    model_class = getattr(transformers, name)
    count = rows or max(tokenizer.get_vocab().values()) + 1
    config = model_class.config_class(
        **{**BODY, "vocab_size": count, "pad_token_id": 0, "tie_word_embeddings": False} | fields
    )
    torch.manual_seed(seed)
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return SavedModel(CheckpointReader.open(folder, folder.name), model_class, config, folder)


@pytest.fixture
def three(tmp_path):
    """Two members and a base that share some words."""
    base = save(tmp_path / "base", word_piece(["cat", "dog", "only-base"]), 0)
    one = save(tmp_path / "one", word_piece(["cat", "bird", "fish", "dog"]), 1)
    two = save(tmp_path / "two", word_piece(["fish", "cat", "horse", "bird"]), 2)
    return one, two, base


def row(model, token, name=EMBEDDINGS):
    tokens = read_tokenizer(model.folder, model.source).tokens
    return model.reader[name][tokens[token]]


def made_rows(aligned, reader, owner, name=EMBEDDINGS):
    """Return token -> row of a reader with the new vocabulary."""
    if aligned.files:
        tokens = TokenizerContent("made", json.loads(aligned.files["tokenizer.json"]), {}).tokens
    else:
        tokens = read_tokenizer(owner.folder, "owner").tokens
    assert reader.shape(name)[0] == aligned.size == reader[name].shape[0]
    return {token: reader[name][number] for token, number in tokens.items()}, tokens


@pytest.mark.parametrize("name", [EMBEDDINGS, "lm_head.weight"])
def test_a_union_has_every_token_the_bases_first(three, name):
    one, two, base = three
    aligned = align_vocabularies([one, two], base, "union")
    rows, tokens = made_rows(aligned, aligned.members[0], base, name)
    assert list(tokens) == "[PAD] [UNK] [CLS] [SEP] cat dog only-base bird fish horse".split()
    assert aligned.size == 10
    assert aligned.changes["vocab_size"] == 10
    same = {"rtol": 0, "atol": 0}
    for model, reader in zip((one, two, base), (*aligned.members, aligned.base), strict=True):
        own = read_tokenizer(model.folder, "own").tokens
        rows, _ = made_rows(aligned, reader, base, name)
        for token in tokens:
            if token in own:
                torch.testing.assert_close(rows[token], row(model, token, name), **same)
        # What the base has is the base's; what it has not is the average of those that have it.
        if "only-base" not in own:
            torch.testing.assert_close(rows["only-base"], row(base, "only-base", name), **same)
        if "dog" not in own:
            torch.testing.assert_close(rows["dog"], row(base, "dog", name), **same)
        if "bird" not in own:
            torch.testing.assert_close(rows["bird"], (row(one, "bird", name) + row(two, "bird", name)) / 2)
        if "horse" not in own:
            torch.testing.assert_close(rows["horse"], row(two, "horse", name), **same)


def test_the_policies_for_rows_a_member_lacks(three):
    one, two, base = three
    rows = {}
    for policy in ("base", "average", "mean", "zero"):
        aligned = align_vocabularies([one, two], base, "union", rows=policy)
        rows[policy], _ = made_rows(aligned, aligned.members[1], base)
    own = two.reader[EMBEDDINGS]
    torch.testing.assert_close(rows["base"]["dog"], row(base, "dog"))
    torch.testing.assert_close(rows["average"]["dog"], (row(base, "dog") + row(one, "dog")) / 2)
    torch.testing.assert_close(rows["mean"]["dog"], own.mean(0))
    assert not rows["zero"]["dog"].any()
    for policy in rows:
        torch.testing.assert_close(rows[policy]["horse"], row(two, "horse"), rtol=0, atol=0)
    with pytest.raises(MergeError, match=r"rows 'avarage' \(did you mean 'average'\?\)"):
        align_vocabularies([one, two], base, "union", rows="avarage")


def test_a_base_among_the_members_counts_once(three):
    one, _, base = three
    aligned = align_vocabularies([one, base], base, "union", rows="average", tokens={"new": {"source": None}})
    rows, _ = made_rows(aligned, aligned.members[0], base)
    torch.testing.assert_close(rows["only-base"], row(base, "only-base"))
    rows, _ = made_rows(aligned, aligned.base, base)
    torch.testing.assert_close(rows["bird"], row(one, "bird"))
    assert not rows["new"].any()  # nobody has it


def test_base_and_a_members_own_vocabulary(three):
    one, two, base = three
    aligned = align_vocabularies([one, two], base, "base")
    rows, tokens = made_rows(aligned, aligned.members[1], base)
    assert list(tokens) == "[PAD] [UNK] [CLS] [SEP] cat dog only-base".split()
    assert aligned.owner is None
    assert not aligned.files  # the base's are copied
    torch.testing.assert_close(rows["dog"], row(base, "dog"))
    without = align_vocabularies([one, two], None, "base")
    assert (without.owner, without.size) == (0, 8)
    assert without.members[0].layout == one.reader.layout
    named = align_vocabularies([one, two], base, "two")
    assert named.owner == 1
    rows, tokens = made_rows(named, named.members[0], two)
    assert tokens == read_tokenizer(two.folder, "two").tokens
    torch.testing.assert_close(rows["horse"], row(two, "horse"))
    with pytest.raises(MergeError, match=r"tokenizer 'onion' \(did you mean 'union'\?\)"):
        align_vocabularies([one, two], base, "onion")


def test_tokens_with_a_source_of_their_own(three):
    one, two, base = three
    tokens = {
        "horse": {"source": {"kind": "zero"}},
        "cat": {"source": "two", "force": True},
        "bird": {"source": {"kind": "model_token", "model": "one", "token": "fish"}},
        "extra": {"source": {"kind": "model_token", "model": "two", "token_id": 5}},
    }
    aligned = align_vocabularies([one, two], base, "union", tokens=tokens, pad_to_multiple_of=8)
    assert aligned.size == 16
    for model, reader in zip((one, two, base), (*aligned.members, aligned.base), strict=True):
        rows, numbers = made_rows(aligned, reader, base)
        own = read_tokenizer(model.folder, "own").tokens
        assert numbers["extra"] == 10  # behind all others
        torch.testing.assert_close(rows["cat"], row(two, "cat"))  # forced on those that have it, too
        torch.testing.assert_close(rows["extra"], row(two, "cat"))
        torch.testing.assert_close(rows["bird"], row(model, "bird") if "bird" in own else row(one, "fish"))
        torch.testing.assert_close(rows["horse"], row(model, "horse") if "horse" in own else torch.zeros(8))
        padding = reader[EMBEDDINGS][11:]
        torch.testing.assert_close(padding, reader[EMBEDDINGS][:11].mean(0).expand(5, 8))
    on_top = [
        entry for entry in json.loads(aligned.files["tokenizer.json"])["added_tokens"] if entry["content"] == "extra"
    ]
    assert [entry["id"] for entry in on_top] == [10]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"source": "three"}, r"tokens.cat: source 'three'.*expected one of one, two, base"),
        ({"source": {"kind": "model_token", "model": "one", "token": "horse"}}, "one has no row for 'horse'"),
        ({"source": {"kind": "model_token", "model": "one", "token_id": 8}}, "one has no row for 8"),
        ({"sauce": "one"}, r"unknown 'sauce' \(did you mean 'source'\?\)"),
    ],
)
def test_a_source_that_is_not_there_is_refused(three, override, message):
    one, two, base = three
    with pytest.raises(MergeError, match=message):
        align_vocabularies([one, two], base, "union", tokens={"cat": override})


def test_pieces_are_cut_out_of_the_new_rows(three):
    one, two, base = three
    aligned = align_vocabularies([one, two], base, "union", pad_to_multiple_of=8)
    reader = aligned.members[1]
    for name in reader:
        whole = reader[name].reshape(-1)
        for start, stop in ((0, 5), (3, min(20, len(whole))), (6, 7), (len(whole) - 3, len(whole))):
            torch.testing.assert_close(reader.piece(name, start, stop), whole[start:stop], rtol=0, atol=0)


def test_everything_else_is_passed_on(three):
    one, two, base = three
    aligned = align_vocabularies([one, two], base, "union")
    for name in one.reader:
        if name not in (EMBEDDINGS, "lm_head.weight"):
            assert torch.equal(aligned.members[0][name], one.reader[name])


def test_a_merge_with_all_tokens_loads_and_reads_as_its_members_did(three, tmp_path):
    one, two, base = three
    aligned = align_vocabularies([one, two], base, "union")
    config = changed_config(one.config, aligned.changes)
    model = one.model_class.from_pretrained(None, config=config, state_dict=dict(aligned.members[1])).eval()
    for name, content in aligned.files.items():
        (tmp_path / name).write_bytes(content)
    union = transformers.AutoTokenizer.from_pretrained(tmp_path)
    own = transformers.AutoTokenizer.from_pretrained(two.folder)
    text = "Horse fish cat bird"
    assert union.convert_ids_to_tokens(union(text).input_ids) == own.convert_ids_to_tokens(own(text).input_ids)
    before = two.model_class.from_pretrained(two.folder).eval()
    with torch.no_grad():
        wanted = before(torch.tensor([own(text).input_ids])).logits[0, -1]
        logits = model(torch.tensor([union(text).input_ids])).logits[0, -1]
    for token, number in own.get_vocab().items():
        assert logits[union.get_vocab()[token]].item() == pytest.approx(wanted[number].item(), rel=1e-5), token


def test_pairs_of_byte_pairs_are_joined(tmp_path):
    one = save(tmp_path / "one", bpe([("a", "b"), ("ab", "c")]), 1)
    two = save(tmp_path / "two", bpe([("d", "e"), ("a", "b"), ("ab", "d")], ("<s>", "</s>", "<two>")), 2)
    aligned = align_vocabularies([one, two], None, "union")
    content = json.loads(aligned.files["tokenizer.json"])
    assert content["model"]["merges"] == [["a", "b"], ["ab", "c"], ["d", "e"], ["ab", "d"]]
    (tmp_path / "union").mkdir()
    for name, file in aligned.files.items():
        (tmp_path / "union" / name).write_bytes(file)
    union = transformers.AutoTokenizer.from_pretrained(tmp_path / "union")
    assert union.tokenize("abc") == ["abc"]
    assert union.tokenize("deabd<two>") == ["de", "abd", "<two>"]
    rows, tokens = made_rows(aligned, aligned.members[0], one)
    assert tokens["abc"] == 9  # the first one's numbers stay
    torch.testing.assert_close(rows["abd"], row(two, "abd"))
    torch.testing.assert_close(rows["<two>"], row(two, "<two>"))


def test_unigram_pieces_are_joined_with_their_scores(tmp_path):
    one = save(tmp_path / "one", unigram([("▁a", -1.0), ("b", -2.0)], ["<mask>"]), 1)
    two = save(tmp_path / "two", unigram([("b", -1.5), ("▁ab", -1.0)]), 2)
    aligned = align_vocabularies([one, two], None, "union")
    content = json.loads(aligned.files["tokenizer.json"])
    assert content["model"]["vocab"] == [
        ["<pad>", 0.0], ["<unk>", 0.0], ["▁a", -1.0], ["b", -2.0], ["<mask>", 0.0], ["▁ab", -1.0]
    ]  # fmt: skip
    rows, tokens = made_rows(aligned, aligned.members[1], one)
    assert tokens["<mask>"] == 4
    torch.testing.assert_close(rows["<mask>"], row(one, "<mask>"))
    torch.testing.assert_close(rows["▁ab"], row(two, "▁ab"))


def test_tokenizers_that_cut_in_other_ways_are_refused(tmp_path, three):
    one, _, base = three
    cased = save(tmp_path / "cased", word_piece(["cat"], lowercase=False), 3)
    with pytest.raises(
        MergeError, match=r"tokenizers of base and cased cut texts in different ways \(normalizer differ\)"
    ):
        align_vocabularies([one, cased], base, "union")
    pairs = save(tmp_path / "pairs", bpe([("a", "b")]), 3)
    with pytest.raises(MergeError, match="base has a WordPiece tokenizer and pairs a BPE"):
        align_vocabularies([one, pairs], base, "union")
    # Rows can be found by token all the same.
    aligned = align_vocabularies([one, cased], base, "base")
    rows, _ = made_rows(aligned, aligned.members[1], base)
    torch.testing.assert_close(rows["cat"], row(cased, "cat"))


def test_the_same_refuses_with_numbers_and_the_first_tokens(three):
    one, two, _ = three
    message = (
        r"one and two have different vocabularies: 8 tokens and 8; 1 only in one \('dog'\); 1 only in two \('horse'\); "
        r"3 under another number \(first 'cat': 4 and 5\)"
    )
    with pytest.raises(MergeError, match=message):
        align_vocabularies([one, two])


def test_the_same_tokens_in_other_pairs_are_other_tokenizers(tmp_path):
    one = save(tmp_path / "one", bpe([("a", "b"), ("b", "c")]), 1)
    two = save(tmp_path / "two", bpe([("a", "b"), ("b", "c")]), 2)
    assert align_vocabularies([one, two]).members == (one.reader, two.reader)
    content = json.loads((two.folder / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (two.folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MergeError, match="the same tokens, joined in another order"):
        align_vocabularies([one, two])


def test_one_tokenizer_and_embeddings_padded_differently(tmp_path):
    one = save(tmp_path / "one", word_piece(["cat", "dog"]), 1, rows=16)
    two = save(tmp_path / "two", word_piece(["cat", "dog"]), 2, rows=8)
    aligned = align_vocabularies([one, two])
    assert (aligned.size, aligned.changes) == (8, {"vocab_size": 8})
    assert torch.equal(aligned.members[0][EMBEDDINGS], one.reader[EMBEDDINGS][:8])
    assert torch.equal(aligned.members[1][EMBEDDINGS], two.reader[EMBEDDINGS])
    cut = align_vocabularies([one, two], None, "base")
    assert cut.size == 6  # exactly the tokens there are


def test_special_tokens_are_those_of_the_tokenizer(tmp_path):
    one = save(tmp_path / "one", word_piece(["cat"]), 1, pad_token_id=1)
    base = save(tmp_path / "base", word_piece(["dog"]), 2, pad_token_id=0, eos_token_id=3)
    aligned = align_vocabularies([one], base, "union")
    assert aligned.changes == {"vocab_size": 6, "pad_token_id": 0, "eos_token_id": 3}
    assert align_vocabularies([one], base, 0).changes == {"vocab_size": 5}


def test_members_without_a_tokenizer(three):
    one, two, base = three
    bare = SavedModel(two.reader, two.model_class, two.config)
    with pytest.raises(MergeError, match="two has no tokenizer and one has one"):
        align_vocabularies([one, bare])
    with pytest.raises(MergeError, match="two has no tokenizer, so its rows cannot be matched"):
        align_vocabularies([one, bare], base, "union")
    bare_one = SavedModel(one.reader, one.model_class, one.config)
    assert align_vocabularies([bare_one, bare]).members == (one.reader, two.reader)


def test_the_vocabulary_of_a_picture_model_is_none(tmp_path):
    fields = {**BODY, "image_size": 8, "patch_size": 4, "num_channels": 1}
    config = transformers.ViTConfig(**fields)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    model = SavedModel(CheckpointReader.open(tmp_path), transformers.ViTModel, config, tmp_path)
    assert align_vocabularies([model, model]).members == (model.reader, model.reader)


def test_rows_along_another_axis_and_half_precision(tmp_path):
    """BART's last bias is a row vector, its tokens lie along the second axis."""
    fields = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
              "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "tie_word_embeddings": True}  # fmt: skip
    name = "BartForConditionalGeneration"
    one = save(tmp_path / "one", word_piece(["cat", "dog"]), 1, name=name, dtype=torch.bfloat16, **fields)
    two = save(tmp_path / "two", word_piece(["dog", "cow"]), 2, name=name, dtype=torch.bfloat16, **fields)
    tensors = dict(two.reader) | {"final_logits_bias": torch.arange(6.0)[None].bfloat16()}
    two = SavedModel(CheckpointReader.of(tensors, "two"), two.model_class, two.config, two.folder)
    aligned = align_vocabularies([one, two], None, "union")
    assert aligned.members[1]["final_logits_bias"].tolist() == [[0.0, 1.0, 2.0, 3.0, 0.0, 4.0, 5.0]]  # cat: one's zero
    assert aligned.members[1].shape("final_logits_bias") == (1, 7)
    assert aligned.members[1].piece("final_logits_bias", 4, 6).tolist() == [0.0, 4.0]
    shared = aligned.members[1]["model.shared.weight"]
    assert shared.dtype == torch.bfloat16
    assert torch.equal(shared[4], row(one, "cat", "model.shared.weight"))


def test_a_tokenizer_without_a_fast_form_is_matched_by_its_tokens(tmp_path):
    """Speech models spell with a plain list of letters."""
    fields = {**BODY, "conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_feat_extract_layers": 1,
              "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0}  # fmt: skip
    members = []
    for place, letters in enumerate(["<pad> <unk> | a b", "<pad> <unk> | a b", "<pad> <unk> | b c"]):
        folder = tmp_path / str(place)
        config = transformers.Wav2Vec2Config(**fields, vocab_size=5)
        torch.manual_seed(place)
        transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
        words = {letter: number for number, letter in enumerate(letters.split())}
        (tmp_path / "vocab.json").write_text(json.dumps(words))
        tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
        tokenizer.save_pretrained(folder)
        members.append(
            SavedModel(CheckpointReader.open(folder, str(place)), transformers.Wav2Vec2ForCTC, config, folder)
        )
    assert align_vocabularies(members[:2]).members == (members[0].reader, members[1].reader)
    with pytest.raises(MergeError, match=r"1 and 2 have different vocabularies: 5 tokens and 5; 1 only in 1 \('a'\)"):
        align_vocabularies(members)
    with pytest.raises(MergeError, match="a Wav2Vec2CTCTokenizer tokenizer cannot be joined"):
        align_vocabularies(members, None, "union")
    aligned = align_vocabularies(members, None, "base")
    assert torch.equal(aligned.members[2]["lm_head.weight"][4], members[2].reader["lm_head.weight"][3])  # b
    mean = (members[0].reader["lm_head.bias"][3] + members[1].reader["lm_head.bias"][3]) / 2
    torch.testing.assert_close(aligned.members[2]["lm_head.bias"][3], mean)  # a


def test_equal_files_are_not_read(tmp_path):
    one = save(tmp_path / "one", word_piece(["cat"]), 1)
    two = save(tmp_path / "two", word_piece(["cat"]), 2)
    for model in (one, two):
        (model.folder / "tokenizer.json").write_text("not JSON, but the same")
    assert align_vocabularies([one, two]).members == (one.reader, two.reader)
    (two.folder / "tokenizer.json").unlink()
    (two.folder / "tokenizer_config.json").unlink()
    (one.folder / "tokenizer.json").write_text(word_piece(["cat"]).to_str())
    with pytest.raises(MergeError, match="two has no tokenizer and one has one"):
        align_vocabularies([one, two])
