//! What the configuration file says is what the server gets, and nothing else is accepted.

use super::*;
use trustformers_engine::{KvType, Numerics};
use trustformers_proto::Task;
use trustformers_runtime::adapters::AdapterSpec;
use trustformers_runtime::device::DeviceChoice;
use trustformers_runtime::spec::SpeculationSpec;
use trustformers_store::Source;

fn error(text: &str) -> String {
    Config::from_str(text).unwrap_err().to_string()
}

#[test]
fn the_example_is_the_defaults() {
    let config = Config::from_str(EXAMPLE).unwrap();
    assert_eq!(config.server, ServerConfig::default());
    assert_eq!(config.prometheus_port, Some(9090));
    assert_eq!(config.batching, BatchingConfig::default());
    assert_eq!(config.models[0].name, "smollm2");
    assert_eq!(config.listen().metrics, Some(config.listen().grpc));
}

#[test]
fn several_models_take_their_own_batch_or_the_common_one() {
    let config = Config::from_str(
        "batching: {max_batch_size: 200, strategy: size, max_wait_time_ms: 7, enable_priority: true}\n\
         models: [{name: a, path: /a, max_batch_size: 16}, {name: b, path: 'file:///b', device: cpu}]",
    )
    .unwrap();
    let specs = config.specs(Some(3)).unwrap();
    assert_eq!(specs.iter().map(|spec| spec.engine.max_batch_size).collect::<Vec<_>>(), [16, 200]);
    let encoder = specs[0].encoder_config();
    assert_eq!((encoder.strategy.as_str(), encoder.max_wait_ms, encoder.priority), ("size", 7, true));
    assert_eq!(encoder.max_batch_size, 16);
    assert_eq!((specs[1].name(), specs[1].device, specs[1].threads), ("b", DeviceChoice::Cpu, Some(3)));
    assert_eq!(specs[1].source, Source::from_path("/b"));
}

#[test]
fn a_model_speculates_in_one_of_two_ways() {
    let speculation = |text: &str| {
        let config = Config::from_str(&format!("models: [{{name: a, path: /a, speculation: {text}}}]"))?;
        Ok(config.specs(None)?[0].speculation.clone())
    };
    assert_eq!(speculation("{ngram: {}}").unwrap(), Some(SpeculationSpec::Ngram));
    let draft = SpeculationSpec::Draft(Source::from_path("/b.gguf"));
    assert_eq!(speculation("{draft: {path: /b.gguf}}").unwrap(), Some(draft));
    assert_eq!(speculation("null").unwrap(), None);
    for (text, says) in [
        ("{}", "models[0].speculation: give one of"),
        ("{ngram: {}, draft: {path: /b}}", "models[0].speculation: give one of"),
        ("{draft: {}}", "models[0].speculation.draft.path: is missing"),
        ("{draft: {path: 'ftp://b/c'}}", "models[0].speculation.draft.path: ftp://"),
        ("{ngram: {n: 3}}", "models[0].speculation.ngram.n: there is no such key"),
    ] {
        let error: ConfigError = speculation(text).unwrap_err();
        assert!(error.to_string().starts_with(says), "{error}");
    }
}

#[test]
fn adapters_have_a_name_and_a_path() {
    let adapters = |text: &str| {
        let config = Config::from_str(&format!("models: [{{name: a, path: /a, adapters: {text}}}]"))?;
        Ok(config.specs(None)?.remove(0).adapters)
    };
    let adapter = |name: &str, path: &str| AdapterSpec {
        name: name.into(),
        source: Source::from_path(path),
        sha256: None,
    };
    let two = adapters("[{name: sql, path: /b, sha256: ab}, {name: chat, path: 'file:///c'}]").unwrap();
    let pinned = AdapterSpec { sha256: Some("ab".into()), ..adapter("sql", "/b") };
    assert_eq!(two, [pinned, adapter("chat", "/c")]);
    assert!(adapters("[]").unwrap().is_empty());
    for (text, says) in [
        ("[{path: /b}]", "models[0].adapters[0].name: is missing"),
        ("[{name: sql}]", "models[0].adapters[0].path: is missing"),
        ("[{name: 'a:b', path: /b}]", "models[0].adapters[0].name: \"a:b\" must have"),
        (
            "[{name: a, path: /b}, {name: a, path: /c}]",
            "models[0].adapters[1].name: \"a\" is the name of another",
        ),
        ("[{name: a, path: 'ftp://b/c'}]", "models[0].adapters[0].path: ftp://"),
        ("[{name: a, path: /b, rank: 3}]", "models[0].adapters[0].rank: there is no such key"),
    ] {
        let error: ConfigError = adapters(text).unwrap_err();
        assert!(error.to_string().starts_with(says), "{error}");
    }
}

#[test]
fn every_key_of_a_model_reaches_its_engine() {
    let text = "models: [{name: a, aliases: [b], path: /a, files: ['*.gguf'], sha256: ab, task: embed, numerics: exact, kv_cache: bf16, \
         context_tokens: 64, max_batch_size: 200, max_queue: 3, \
         batching: {strategy: size, max_wait_time_ms: 7, enable_priority: true}}]";
    let spec = Config::from_str(text).unwrap().specs(None).unwrap().remove(0);
    assert_eq!(spec.names, ["a", "b"]);
    assert_eq!(spec.files, ["*.gguf"]);
    assert_eq!((spec.sha256.as_deref(), spec.task), (Some("ab"), Some(Task::Embed)));
    assert_eq!(spec.engine.kv_cache, Some(KvType::Bf16));
    let encoder = spec.encoder_config();
    assert_eq!((encoder.strategy, encoder.max_wait_ms, encoder.priority), (BatchingStrategy::Size, 7, true));
    assert_eq!((encoder.max_batch_size, encoder.max_queue), (200, 3));
    assert_eq!((encoder.context_tokens, encoder.numerics), (Some(64), Numerics::Exact));
}

#[test]
fn what_is_printed_is_read_back_with_every_default() {
    let text = "server: {host: '::1', port: 1, allowed_origins: ['https://a.example'], model_control: false, drain_timeout_ms: 5, admin: {port: 2, keys: /k, audience: a, subject: s, issuer: i}}\nbatching: {strategy: time}\n\
         models: [{name: a, path: 'file:///a%20b'}, {name: b, path: /b, aliases: [c], speculation: {ngram: {}}}, \
         {name: d, path: /d, speculation: {draft: {path: /e}}, adapters: [{name: sql, path: /f}]}]\nmonitoring: {prometheus: {port: 7}}";
    for text in [text, "models: [{name: a, path: /a}]", EXAMPLE] {
        let config = Config::from_str(text).unwrap();
        let printed = config.effective().to_yaml().unwrap();
        assert_eq!(Config::from_str(&printed).unwrap(), config.effective(), "{printed}");
        let specs = |config: &Config| format!("{:?}", config.specs(None).unwrap());
        assert_eq!(specs(&Config::from_str(&printed).unwrap()), specs(&config));
    }
    let printed = Config::from_str("models: [{name: a, path: /a}]").unwrap().effective().to_yaml().unwrap();
    for line in [
        "  port: 8080\n",
        "  model_control: true\n",
        "  drain_timeout_ms: 30000\n",
        "  max_wait_time_ms: 10\n",
        "  device: auto\n",
        "  numerics: fast\n",
        "  kv_cache: auto\n",
        "  max_queue: 512\n",
    ] {
        assert!(printed.contains(line), "{line} {printed}");
    }
}

#[test]
fn an_unknown_key_is_refused_with_its_path_and_a_hint() {
    for (text, path, hint) in [
        ("sever: {}", "sever: ", "\"server\""),
        ("server: {grpcPort: 1}\nmodels: []", "server.grpcPort: ", "\"grpc_port\""),
        ("models: [{name: a, path: /a}, {nam: b, path: /b}]", "models[1].nam: ", "\"name\""),
        (
            "monitoring: {prometheus: {ports: 1}}\nmodels: [{name: a, path: /a}]",
            "monitoring.prometheus.ports",
            "port",
        ),
        (
            "models: [{name: a, path: /a, batching: {strategi: size}}]",
            "models[0].batching.strategi",
            "\"strategy\"",
        ),
        ("completely_different: 1", "completely_different", "known are: server"),
    ] {
        let error = error(text);
        assert!(error.starts_with(path) && error.contains(hint), "{error}");
    }
}

#[test]
fn keys_that_are_not_built_yet_are_refused_as_such() {
    let models = "models: [{name: a, path: /a}]";
    let cache = error(&format!("cache: {{enabled: true}}\n{models}"));
    assert!(cache.starts_with("cache") && cache.contains("not available in this version"), "{cache}");
    let error = error("models: [{name: a, path: /a, device: 'cuda:0'}]");
    assert!(
        error.starts_with("models[0].device: device \"cuda:0\" is not available in this version"),
        "{error}"
    );
}

#[test]
fn one_section_of_monitoring_says_where_spans_go() {
    let models = "models: [{name: a, path: /a}]";
    let of = |text: &str| -> Config { format!("monitoring: {{{text}}}\n{models}").parse().unwrap() };
    let jaeger =
        of("jaeger: {enabled: true, endpoint: 'http://localhost:14268/api/traces', sampling_rate: 0.1}");
    let options = jaeger.tracing.clone().unwrap();
    assert_eq!(options.destination.to_string(), "http://localhost:4317 (OTLP over gRPC)");
    assert_eq!((options.sampling_ratio, options.service_name.as_str()), (0.1, "trustformers-serve"));
    // What is effective can be written and read again.
    for config in [jaeger, of("zipkin: {endpoint: z, model_attributes: true, baggage: [team]}")] {
        assert_eq!(config.to_yaml().unwrap().parse::<Config>().unwrap().tracing, config.tracing);
    }
    assert_eq!(of("otlp: {enabled: false, endpoint: c}").tracing, None);
    for (text, wanted) in [
        ("otlp: {}", "monitoring.otlp.endpoint: is missing"),
        (
            "otlp: {endpoint: 'https://c'}",
            "monitoring.otlp.endpoint: trace endpoint \"https://c\" needs http",
        ),
        ("zipkin: {endpoint: z, sampling_rate: 2}", "monitoring.zipkin.sampling_rate: 2 is not"),
        (
            "otlp: {endpoint: a}, jaeger: {endpoint: b}",
            "monitoring.jaeger: is enabled beside monitoring.otlp",
        ),
        ("otlp: {endpoin: a}", "monitoring.otlp.endpoin: "),
    ] {
        let error = error(&format!("monitoring: {{{text}}}\n{models}"));
        assert!(error.starts_with(wanted), "{error}");
    }
}

#[test]
fn wrong_values_are_named_with_their_path() {
    let models = "models: [{name: a, path: /a}]";
    for (text, path) in [
        (String::new(), "models: is missing"),
        ("models: []".into(), "models: is empty"),
        ("models: [{path: /a}]".into(), "models[0].name: is missing"),
        ("models: [a]".into(), "models[0]: invalid type: string \"a\", expected keys and values"),
        ("models: [{name: a, path: /a}, {name: a, path: /b}]".into(), "models[1].name: \"a\" is given twice"),
        ("models: [{name: a, path: /a, aliases: [a]}]".into(), "models[0].aliases: \"a\" is given twice"),
        ("models: [{name: a, path: /a, context_tokens: 0}]".into(), "models[0].context_tokens: 0"),
        ("models: [{name: a, path: /a, max_queue: 0}]".into(), "models[0].max_queue: 0"),
        ("models: [{name: a, path: /a, numerics: best}]".into(), "models[0].numerics: \"best\""),
        ("models: [{name: a, path: /a, kv_cache: int8}]".into(), "models[0].kv_cache: \"int8\""),
        ("models: [{name: a, path: /a, task: dance}]".into(), "models[0].task: \"dance\""),
        (
            "models: [{name: a, path: /a, batching: {max_wait_time_ms: 0}}]".into(),
            "models[0].batching.max_wait_time_ms: 0",
        ),
        (format!("server: {{drain_timeout_ms: 0}}\n{models}"), "server.drain_timeout_ms: 0"),
        (format!("server: {{admin: {{port: 1}}}}\n{models}"), "server.admin.keys: is missing"),
        (format!("server: {{allowed_origins: [here]}}\n{models}"), "server.allowed_origins: \"here\" is not"),
        (format!("server: {{allowed_origins: []}}\n{models}"), "server.allowed_origins: is empty"),
        (format!("server: {{port: 70000}}\n{models}"), "server.port: "),
        (format!("server: {{host: here}}\n{models}"), "server.host: \"here\" is not an address"),
        (format!("server: {{port: 9090}}\n{models}"), "server.grpc_port: is the same"),
        (format!("batching: {{max_batch_size: 257}}\n{models}"), "batching.max_batch_size: 257"),
        (format!("batching: {{strategy: fast}}\n{models}"), "batching.strategy: \"fast\""),
        (
            format!("batching: {{max_wait_time_ms: 0}}\n{models}"),
            "batching.max_wait_time_ms: 0 is not within",
        ),
        (format!("batching: {{max_wait_time_ms: 1001}}\n{models}"), "batching.max_wait_time_ms: 1001"),
    ] {
        let error = error(&text);
        assert!(error.starts_with(path), "{error}");
    }
    assert!(error("server: [").contains("not valid YAML"));
    let config = Config::from_str("models: [{name: a, path: 'ftp://org/a'}]").unwrap();
    let error = config.specs(None).unwrap_err().to_string();
    assert!(error.starts_with("models[0].path: ftp://"), "{error}");
}
