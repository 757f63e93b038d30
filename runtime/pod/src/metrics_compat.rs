//! `--metrics-compat vllm`: the same figures once more under the names that vLLM gives them.
//!
//! The Gateway API inference extension, autoscalers and dashboards read those names. The figures are computed
//! from the families of this server when `/metrics` is read, so they cannot differ from them. Requests for
//! adapters count as requests of their model, so there is no `vllm:lora_requests_info`.

use std::collections::BTreeMap;
use std::str::FromStr;

use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};

/// Tokens of one KV block.
const BLOCK_TOKENS: usize = trustformers_plan::KV_BLOCK_TOKENS;

/// Which other server's names `/metrics` has beside its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricsCompat {
    /// Those of vLLM.
    Vllm,
}

impl FromStr for MetricsCompat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "vllm" => Ok(Self::Vllm),
            other => Err(format!("{other:?} is not known: use vllm")),
        }
    }
}

/// A name of ours and one of vLLM's with the same meaning.
struct Renamed(&'static str, &'static str);

/// Families that are copied as they are, but for the names of their labels.
const RENAMED: &[Renamed] = &[
    Renamed("trustformers_requests_running", "vllm:num_requests_running"),
    Renamed("trustformers_requests_waiting", "vllm:num_requests_waiting"),
    Renamed("trustformers_preemptions_total", "vllm:num_preemptions_total"),
    Renamed("trustformers_generated_tokens_total", "vllm:generation_tokens_total"),
    Renamed("trustformers_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
    Renamed("trustformers_inter_token_seconds", "vllm:inter_token_latency_seconds"),
    Renamed("trustformers_request_seconds", "vllm:e2e_request_latency_seconds"),
    Renamed("trustformers_queue_wait_seconds", "vllm:request_queue_time_seconds"),
    Renamed("trustformers_prefill_seconds", "vllm:request_prefill_time_seconds"),
    Renamed("trustformers_decode_seconds", "vllm:request_decode_time_seconds"),
    Renamed("trustformers_prompt_tokens_reused_total", "vllm:prefix_cache_hits_total"),
    Renamed("trustformers_draft_tokens_total", "vllm:spec_decode_num_draft_tokens_total"),
    Renamed("trustformers_draft_tokens_accepted_total", "vllm:spec_decode_num_accepted_tokens_total"),
];

impl MetricsCompat {
    /// The families that these ones become.
    pub fn families(self, own: &[MetricFamily]) -> Vec<MetricFamily> {
        let Self::Vllm = self;
        let renamed = RENAMED.iter().filter_map(|Renamed(from, to)| Some(copied(family(own, from)?, to)));
        let mut families: Vec<_> = renamed.collect();
        families.extend(success(own));
        families.extend(cache(own));
        families.extend(prompts(own));
        families
    }
}

fn family<'a>(own: &'a [MetricFamily], name: &str) -> Option<&'a MetricFamily> {
    own.iter().find(|family| family.name() == name)
}

fn label(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

fn value_of<'a>(metric: &'a Metric, name: &str) -> &'a str {
    metric.get_label().iter().find(|pair| pair.name() == name).map_or("", LabelPair::value)
}

fn new_family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn copied(from: &MetricFamily, name: &str) -> MetricFamily {
    let metrics = from.get_metric().iter().map(|metric| {
        let mut metric = metric.clone();
        metric.set_label(vec![label("model_name", value_of(&metric, "model"))]);
        metric
    });
    new_family(name, from.help(), from.get_field_type(), metrics.collect())
}

fn counter(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut metric = Metric::from_label(labels);
    let mut counter = Counter::default();
    counter.set_value(value);
    metric.set_counter(counter);
    metric
}

fn gauge(labels: Vec<LabelPair>, value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::from_gauge(gauge);
    metric.set_label(labels);
    metric
}

/// Requests that were answered to their end.
fn success(own: &[MetricFamily]) -> Option<MetricFamily> {
    let requests = family(own, "trustformers_requests_total")?;
    let answered = requests.get_metric().iter().filter_map(|metric| {
        let reason = Some(value_of(metric, "outcome")).filter(|word| ["stop", "length"].contains(word))?;
        let labels = vec![label("finished_reason", reason), label("model_name", value_of(metric, "model"))];
        Some(counter(labels, metric.get_counter().get_value()))
    });
    let help = "Requests that were answered to their end, by why they ended.";
    Some(new_family("vllm:request_success_total", help, MetricType::COUNTER, answered.collect()))
}

/// The figure of each model, gauge or counter.
fn by_model(own: &[MetricFamily], name: &str) -> BTreeMap<String, f64> {
    let metrics = family(own, name).map(MetricFamily::get_metric).unwrap_or_default();
    let figure = |metric: &Metric| metric.get_gauge().get_value() + metric.get_counter().get_value();
    metrics.iter().map(|metric| (value_of(metric, "model").to_owned(), figure(metric))).collect()
}

/// How full the KV cache is, and how large.
fn cache(own: &[MetricFamily]) -> Vec<MetricFamily> {
    let used = by_model(own, "trustformers_kv_blocks_used");
    let (mut usage, mut sizes) = (Vec::new(), Vec::new());
    for (model, total) in by_model(own, "trustformers_kv_blocks_total") {
        let used = used.get(&model).copied().unwrap_or_default();
        let share = if total > 0.0 { used / total } else { 0.0 };
        usage.push(gauge(vec![label("model_name", &model)], share));
        let labels = vec![
            label("block_size", &BLOCK_TOKENS.to_string()),
            label("model_name", &model),
            label("num_gpu_blocks", &total.to_string()),
        ];
        sizes.push(gauge(labels, 1.0));
    }
    let help = "KV cache blocks that sequences use, as a share of all, 0 to 1.";
    vec![
        new_family("vllm:kv_cache_usage_perc", help, MetricType::GAUGE, usage),
        new_family("vllm:cache_config_info", "The size of the KV cache.", MetricType::GAUGE, sizes),
    ]
}

/// Prompt tokens as vLLM counts them: those that were in the cache, too.
fn prompts(own: &[MetricFamily]) -> Vec<MetricFamily> {
    let reused = by_model(own, "trustformers_prompt_tokens_reused_total");
    let computed = by_model(own, "trustformers_prompt_tokens_total");
    let all = |name: &str, help: &str| {
        let metrics = computed.iter().map(|(model, tokens)| {
            let reused = reused.get(model).copied().unwrap_or_default();
            counter(vec![label("model_name", model)], tokens + reused)
        });
        new_family(name, help, MetricType::COUNTER, metrics.collect())
    };
    vec![
        all("vllm:prompt_tokens_total", "Prompt tokens, computed or in the cache."),
        all("vllm:prefix_cache_queries_total", "Prompt tokens that were looked up in the cache."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::{
        Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder,
    };
    use trustformers_engine::EngineMetrics;

    fn text(registry: &Registry) -> String {
        let families = MetricsCompat::Vllm.families(&registry.gather());
        let mut bytes = Vec::new();
        TextEncoder::new().encode(&families, &mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn the_figures_are_those_of_the_server_under_the_other_names() {
        let registry = Registry::new();
        let counter = |name: &str, labels: &[&str]| {
            let family = IntCounterVec::new(Opts::new(name, "x"), labels).unwrap();
            registry.register(Box::new(family.clone())).unwrap();
            family
        };
        let gauge = |name: &str, value: i64| {
            let family = IntGaugeVec::new(Opts::new(name, "x"), &["model"]).unwrap();
            registry.register(Box::new(family.clone())).unwrap();
            family.with_label_values(&["m"]).set(value);
        };
        gauge("trustformers_requests_waiting", 7);
        gauge("trustformers_requests_running", 3);
        gauge("trustformers_kv_blocks_used", 5);
        gauge("trustformers_kv_blocks_total", 20);
        let requests = counter("trustformers_requests_total", &["model", "outcome"]);
        requests.with_label_values(&["m", "stop"]).inc_by(4);
        requests.with_label_values(&["m", "failed"]).inc_by(9);
        counter("trustformers_prompt_tokens_total", &["model"]).with_label_values(&["m"]).inc_by(100);
        counter("trustformers_prompt_tokens_reused_total", &["model"]).with_label_values(&["m"]).inc_by(60);
        let seconds = HistogramOpts::new("trustformers_request_seconds", "x").buckets(vec![1.0, 2.0]);
        let seconds = HistogramVec::new(seconds, &["model"]).unwrap();
        registry.register(Box::new(seconds.clone())).unwrap();
        seconds.with_label_values(&["m"]).observe(1.5);
        let text = text(&registry);
        for line in [
            "vllm:num_requests_waiting{model_name=\"m\"} 7",
            "vllm:num_requests_running{model_name=\"m\"} 3",
            "vllm:kv_cache_usage_perc{model_name=\"m\"} 0.25",
            "vllm:cache_config_info{block_size=\"16\",model_name=\"m\",num_gpu_blocks=\"20\"} 1",
            "vllm:request_success_total{finished_reason=\"stop\",model_name=\"m\"} 4",
            "vllm:prompt_tokens_total{model_name=\"m\"} 160",
            "vllm:prefix_cache_queries_total{model_name=\"m\"} 160",
            "vllm:prefix_cache_hits_total{model_name=\"m\"} 60",
            "vllm:e2e_request_latency_seconds_bucket{model_name=\"m\",le=\"2\"} 1",
            "vllm:e2e_request_latency_seconds_sum{model_name=\"m\"} 1.5",
        ] {
            assert!(text.lines().any(|each| each == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("failed") && !text.contains("lora"), "{text}");
    }

    #[test]
    fn every_family_that_is_renamed_is_one_of_the_engines() {
        let registry = Registry::new();
        EngineMetrics::register(&registry).unwrap();
        // A family without series is not gathered, so it is looked for by registering it again.
        for Renamed(name, _) in RENAMED {
            let again = prometheus::IntCounter::new(*name, "x").unwrap();
            assert!(registry.register(Box::new(again)).is_err(), "{name} is not registered by the engine");
        }
    }
}
