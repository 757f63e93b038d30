//! Translates generate requests from the API to the engine.

use trustformers_api::{Format, Generation, Options, Priority};
use trustformers_engine::{GenerateParams, Grammar, Prompt};
use trustformers_model::SamplingSettings;

/// The request with what the model's files recommend for the settings that the caller left out.
pub(crate) fn with_model_settings(request: Generation, model: &SamplingSettings) -> Generation {
    let Generation { temperature, top_p, left_out, options, .. } = request;
    let recommended = |left_out: bool, value: Option<f32>| value.filter(|_| left_out);
    let options = Options {
        top_k: options.top_k.or(model.top_k),
        min_p: options.min_p.or(model.min_p),
        typical_p: options.typical_p.or(model.typical_p),
        repetition_penalty: options.repetition_penalty.or(model.repetition_penalty),
        ..options
    };
    Generation {
        temperature: recommended(left_out.temperature, model.temperature).unwrap_or(temperature),
        top_p: recommended(left_out.top_p, model.top_p).unwrap_or(top_p),
        options,
        ..request
    }
}

/// The parameters of the engine, with `prompt` instead of the request's own, which may be a conversation.
/// Fields that the request leaves out take the engine's defaults.
pub fn generate_params(request: Generation, prompt: Prompt) -> GenerateParams {
    let Generation { max_tokens, temperature, top_p, seed, priority, tenant, options, .. } = request;
    let Options {
        top_k,
        min_p,
        typical_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        logprobs,
        stop,
        stop_token_ids,
        format,
    } = options;
    let plain = GenerateParams::greedy(String::new(), max_tokens as usize);
    GenerateParams {
        prompt,
        temperature,
        top_p,
        top_k: top_k.map_or(plain.top_k, |count| count as usize),
        min_p: min_p.unwrap_or(plain.min_p),
        typical_p: typical_p.unwrap_or(plain.typical_p),
        repetition_penalty: repetition_penalty.unwrap_or(plain.repetition_penalty),
        presence_penalty: presence_penalty.unwrap_or(plain.presence_penalty),
        frequency_penalty: frequency_penalty.unwrap_or(plain.frequency_penalty),
        logit_bias,
        logprobs: logprobs.map(|count| count as usize),
        stop,
        stop_token_ids,
        grammar: format.map(|format| match format {
            Format::JsonObject => Grammar::JsonObject,
            Format::JsonSchema(schema) => Grammar::JsonSchema(schema),
            Format::Regex(regex) => Grammar::Regex(regex),
            Format::Grammar(grammar) => Grammar::Lark(grammar),
        }),
        seed,
        priority: class(priority),
        tenant,
        ..plain
    }
}

/// The engine's type of a priority class.
pub(crate) fn class(priority: Priority) -> trustformers_engine::Priority {
    match priority {
        Priority::High => trustformers_engine::Priority::High,
        Priority::Normal => trustformers_engine::Priority::Normal,
        Priority::Low => trustformers_engine::Priority::Low,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_api::Asked;
    use trustformers_api::fields::{GRPC_DEFAULTS, HTTP_DEFAULTS};

    fn asked(options: Options) -> GenerateParams {
        let asked = Asked { prompt: "Hi".into(), top_p: Some(1.0), options, ..Asked::default() };
        generate_params(asked.check(&GRPC_DEFAULTS).unwrap(), Prompt::Text("Hi".into()))
    }

    #[test]
    fn what_is_left_out_is_plain_greedy() {
        assert_eq!(asked(Options::default()), GenerateParams::greedy("Hi", 100));
    }

    #[test]
    fn what_the_model_recommends_stands_for_what_is_left_out() {
        let model = SamplingSettings {
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(20),
            repetition_penalty: Some(1.05),
            ..SamplingSettings::default()
        };
        let params = |asked: Asked| {
            let request = asked.check(&HTTP_DEFAULTS).unwrap();
            generate_params(with_model_settings(request, &model), Prompt::Text(String::new()))
        };
        let plain = params(Asked { prompt: "Hi".into(), ..Asked::default() });
        assert_eq!((plain.temperature, plain.top_p, plain.top_k), (0.6, 0.95, 20));
        assert_eq!((plain.repetition_penalty, plain.min_p), (1.05, 0.0));
        let options = Options { top_k: Some(0), repetition_penalty: Some(1.0), ..Options::default() };
        let own = params(Asked {
            prompt: "Hi".into(),
            temperature: Some(0.0),
            top_p: Some(0.9),
            options,
            ..Asked::default()
        });
        assert_eq!((own.temperature, own.top_p, own.top_k, own.repetition_penalty), (0.0, 0.9, 0, 1.0));
    }

    #[test]
    fn class_and_tenant_arrive() {
        let asked = Asked {
            prompt: "Hi".into(),
            priority: Some(Priority::Low),
            tenant: "team".into(),
            ..Asked::default()
        };
        let params = generate_params(asked.check(&GRPC_DEFAULTS).unwrap(), Prompt::Tokens(vec![1]));
        assert_eq!(params.prompt, Prompt::Tokens(vec![1]));
        assert_eq!((params.priority, params.tenant.as_str()), (trustformers_engine::Priority::Low, "team"));
    }

    #[test]
    fn every_option_arrives() {
        let options = Options {
            top_k: Some(4),
            min_p: Some(0.1),
            typical_p: Some(0.2),
            repetition_penalty: Some(1.3),
            presence_penalty: Some(0.4),
            frequency_penalty: Some(0.5),
            logit_bias: vec![(6, 0.7)],
            logprobs: Some(8),
            stop: vec!["9".into()],
            stop_token_ids: vec![10],
            format: Some(Format::Regex("11".into())),
        };
        let wanted = GenerateParams {
            prompt: Prompt::Text("Hi".into()),
            top_k: 4,
            min_p: 0.1,
            typical_p: 0.2,
            repetition_penalty: 1.3,
            presence_penalty: 0.4,
            frequency_penalty: 0.5,
            logit_bias: vec![(6, 0.7)],
            logprobs: Some(8),
            stop: vec!["9".into()],
            stop_token_ids: vec![10],
            grammar: Some(Grammar::Regex("11".into())),
            ..GenerateParams::greedy("", 100)
        };
        assert_eq!(asked(options), wanted);
    }
}
