//! Writes the valid inputs of the corpus again. Run it by hand after a format changes:
//! `cargo test --profile ci -p trustformers-fuzz --test targets -- --ignored writes_the_valid_inputs`.

use crate::checkpoint::encoder;
use crate::corpus;
use prost::Message;
use trustformers_model::gguf::GgufValue;
use trustformers_model::seeded::{SeededFamily, SeededModel};
use trustformers_plan::DType;
use trustformers_proto::inference::model_infer_request::InferInputTensor;
use trustformers_proto::inference::{InferTensorContents, ModelInferRequest};
use trustformers_proto::v1;

/// A model of some 18 KiB.
pub(crate) const MODEL: SeededModel = SeededModel {
    family: SeededFamily::Llama,
    seed: 1,
    layers: 1,
    heads: 2,
    kv_heads: 1,
    head_dim: 4,
    feed_forward: 16,
    context_tokens: 64,
    dtype: DType::F16,
    tied: true,
};

fn put(target: &str, name: &str, content: impl AsRef<[u8]>) {
    let folder = corpus(target);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(name), content).unwrap();
}

#[test]
#[ignore = "it writes into the source tree"]
fn writes_the_valid_inputs() {
    checkpoints();
    for (name, template) in TEMPLATES {
        put("chat", name, template);
    }
    for (name, request) in REQUESTS {
        put("http", name, request);
    }
    messages();
    for (name, format) in FORMATS {
        put("format", name, format);
    }
}

/// Valid GGUF files of two architectures.
pub(crate) fn models() -> [Vec<u8>; 2] {
    let template = GgufValue::String(TEMPLATES[0].1.to_owned());
    [
        MODEL.gguf_with(&[("tokenizer.chat_template", template)]),
        SeededModel { family: SeededFamily::Qwen2, tied: false, ..MODEL }.gguf(),
    ]
}

fn checkpoints() {
    let files = encoder().files();
    put("tokenizer", "plain", &files["tokenizer.json"]);
    for (name, content) in
        files.iter().filter(|(name, _)| name.ends_with(".json") && **name != "tokenizer.json")
    {
        put("checkpoint", &name.replace('/', "-"), [name.as_bytes(), b"\n", content].concat());
    }
    let others = [
        ("config_sentence_transformers.json", r#"{"prompts": {"q": "the "}, "default_prompt_name": "q"}"#),
        (
            "tokenizer_config.json",
            r#"{"model_max_length": 1e30, "chat_template": [{"name": "default", "template": "a"}]}"#,
        ),
    ];
    for (name, content) in others {
        put("checkpoint", name, format!("{name}\n{content}"));
    }
}

const TEMPLATES: [(&str, &str); 3] = [
    (
        "messages",
        "{% set ns = namespace(n=0) %}{%- for m in messages -%}{% set ns.n = ns.n + 1 %}<|im_start|>{{ m.role }}\n\
         {{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}",
    ),
    (
        "macros",
        "{% macro f(x, n=3) %}{% if n > 0 %}[{{ x | tojson(indent=2) }}]{{ f([x], n - 1) }}{% endif %}{% endmacro %}\
         {{ f(messages) }}{% set ns = namespace() %}{% set ns.t %}a{% endset %}{{ ns.t | upper }}",
    ),
    (
        "loops",
        "{% for m in messages recursive %}{{ loop.index }}{{ m.items() | list }}{% if loop.first %}{{ loop(messages[1:]) }}\
         {% endif %}{% endfor %}{% raw %}{% set ns.x %}{% endraw %}{{ strftime_now('%d %b %Y') }}",
    ),
];

const REQUESTS: [(&str, &str); 11] = [
    (
        "generate",
        "POST /v1/generate\n{\"prompt\": \"hi\", \"max_tokens\": 4, \"temperature\": 0.5, \"top_p\": 0.9, \"seed\": 7, \"stop\": [\"a\"], \
         \"logit_bias\": {\"3\": -1.5}, \"response_format\": {\"type\": \"json_schema\", \"schema\": {\"type\": \"object\"}}}",
    ),
    (
        "stream",
        "POST /v1/generate/stream\n{\"prompt\": \"hi\", \"model\": \"fake\", \"logprobs\": 2, \"priority\": \"high\"}",
    ),
    (
        "embeddings",
        "POST /v1/embeddings\n{\"input\": [\"a\", \"b\"], \"encoding_format\": \"base64\", \"dimensions\": 2}",
    ),
    (
        "classify",
        "POST /v1/classify\n{\"input\": [\"a\", [\"b\", \"c\"]], \"top_k\": 1, \"raw_scores\": true, \"truncate\": false}",
    ),
    (
        "rerank",
        "POST /v1/rerank\n{\"query\": \"a\", \"documents\": [\"b\", {\"text\": \"c\"}], \"top_n\": 1, \"return_documents\": true}",
    ),
    ("tokens", "POST /v1/embeddings\n{\"input\": [[1, 2], [3]], \"truncate\": true, \"user\": \"u\"}"),
    (
        "tensors",
        "POST /v2/models/fake/infer\n{\"id\": \"1\", \"inputs\": [{\"name\": \"text_input\", \"shape\": [2, 1], \"datatype\": \"BYTES\", \
         \"data\": [[\"a\"], [\"b\"]]}, {\"name\": \"max_tokens\", \"shape\": [1], \"datatype\": \"INT32\", \"data\": [4]}], \
         \"outputs\": [{\"name\": \"text_output\", \"parameters\": {\"binary_data\": true}}]}",
    ),
    (
        "tensors_of_ids",
        "POST /v2/models/vectors/versions/1/infer\n{\"inputs\": [{\"name\": \"input_ids\", \"shape\": [1, 2], \"datatype\": \"INT64\", \
         \"data\": [1, 2]}, {\"name\": \"attention_mask\", \"shape\": [1, 2], \"datatype\": \"INT64\", \"data\": [1, 0]}]}",
    ),
    (
        "text_input",
        "POST /v2/models/fake/generate_stream\n{\"text_input\": \"hi\", \"parameters\": {\"max_tokens\": 4, \"bad_words\": [\"\"]}}",
    ),
    ("models", "GET /v1/models\n"),
    ("health", "GET /health/ready\n"),
];

const FORMATS: [(&str, &str); 6] = [
    (
        "schema",
        "json_schema\n{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"integer\", \"minimum\": 1}, \"b\": {\"enum\": [\"x\", 1, null]}}, \
         \"required\": [\"a\"], \"additionalProperties\": false}",
    ),
    (
        "refs",
        "json_schema\n{\"$defs\": {\"p\": {\"type\": \"array\", \"items\": {\"anyOf\": [{\"type\": \"string\", \"pattern\": \"^[a-z]+$\"}, \
         {\"$ref\": \"#/$defs/p\"}]}, \"maxItems\": 3}}, \"$ref\": \"#/$defs/p\"}",
    ),
    ("regex", "regex\n[a-z]{1,8}(-[0-9]+)*|x?y+"),
    ("lark", "lark\nstart: \"a\" word (\",\" word)*\nword: /[a-z]+/ | NUMBER\nNUMBER: /[0-9]{1,3}/\n"),
    ("lark_json", "lark\nstart: %json {\"type\": \"array\", \"items\": {\"type\": \"boolean\"}}\n"),
    ("const", "json_schema\n{\"const\": -9223372036854775808}"),
];

fn messages() {
    let generate = v1::GenerateRequest { prompt: "hi".into(), ..Default::default() };
    let embed = v1::EmbedRequest { ..Default::default() };
    let classify = v1::ClassifyRequest { input: vec!["hi".into()], ..Default::default() };
    let rerank = v1::RerankRequest { query: "hi".into(), documents: vec!["a".into()], ..Default::default() };
    let service = "/trustformers.v1.InferenceService";
    for (name, method, content) in [
        ("generate", "Generate", generate.encode_to_vec()),
        ("stream", "GenerateStream", generate.encode_to_vec()),
        ("embed", "Embed", embed.encode_to_vec()),
        ("classify", "Classify", classify.encode_to_vec()),
        ("rerank", "Rerank", rerank.encode_to_vec()),
    ] {
        put("grpc", name, [format!("{service}/{method}\n").as_bytes(), &content].concat());
    }
    let contents = InferTensorContents { bytes_contents: vec![b"hi".to_vec()], ..Default::default() };
    let text = InferInputTensor {
        name: "text_input".into(),
        datatype: "BYTES".into(),
        shape: vec![1],
        contents: Some(contents),
        ..Default::default()
    };
    let typed = ModelInferRequest { model_name: "fake".to_owned(), inputs: vec![text], ..Default::default() };
    // Inputs of the corpus are text. The lengths of raw tensors are not: only mutations make them.
    for (name, method) in [("tensors", "ModelInfer"), ("tensor_stream", "ModelStreamInfer")] {
        let path = format!("/inference.GRPCInferenceService/{method}\n");
        put("grpc", name, [path.as_bytes(), &typed.encode_to_vec()].concat());
    }
    for (name, path) in [
        ("models", "/trustformers.v1.ModelService/ListModels"),
        ("watch", "/trustformers.v1.ModelService/WatchModels"),
        ("health", "/grpc.health.v1.Health/Check"),
    ] {
        put("grpc", name, format!("{path}\n"));
    }
}
