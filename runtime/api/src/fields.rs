//! Defaults and limits of a request's fields, in one place for both protocols.
//!
//! The protocols differ in one thing only: JSON can leave a field out, proto3 cannot, so over gRPC 0 stands
//! for "not given". The temperature's default differs too, as promised to users: 0.7 over HTTP, greedy over
//! gRPC.

use trustformers_proto::v1;

use axum::http::HeaderMap;

use crate::conversation::Prompt;
use crate::error::ApiError;
use crate::options::Options;
use crate::priority::{self, Priority};
use crate::{revision, tenant};

/// What stands where a field is not given.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// New tokens at most.
    pub max_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus of sampling.
    pub top_p: f32,
}

/// Defaults of the HTTP routes.
pub const HTTP_DEFAULTS: Defaults = Defaults { max_tokens: 100, temperature: 0.7, top_p: 0.9 };
/// Defaults of the gRPC methods.
pub const GRPC_DEFAULTS: Defaults = Defaults { max_tokens: 100, temperature: 0.0, top_p: 0.9 };

/// Highest temperature; above it sampling is noise, and a value such as 70 is a slip for 0.70.
pub const MAX_TEMPERATURE: f32 = 100.0;

/// A request as it was asked, before defaults and checks.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Asked {
    /// What to continue.
    pub prompt: Prompt,
    /// A model's name.
    pub model: Option<String>,
    /// The revision that must answer; none: any.
    pub revision: Option<String>,
    /// New tokens at most.
    pub max_tokens: Option<u32>,
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus of sampling in (0, 1].
    pub top_p: Option<f32>,
    /// Makes sampling repeatable.
    pub seed: Option<u64>,
    /// How urgent it is.
    pub priority: Option<Priority>,
    /// The tenant that the request belongs to; empty: none.
    pub tenant: String,
    /// The further fields.
    pub options: Options,
}

/// Fields that a caller left out, for which what a model recommends stands before the protocol's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LeftOut {
    /// The temperature.
    pub temperature: bool,
    /// The nucleus.
    pub top_p: bool,
}

/// A request whose fields are all within their limits.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// What to continue, not empty.
    pub prompt: Prompt,
    /// A model's name; none where the caller left the choice open.
    pub model: Option<String>,
    /// The revision that must answer; none: any.
    pub revision: Option<String>,
    /// New tokens at most, 1 or more.
    pub max_tokens: u32,
    /// 0 is greedy; up to [`MAX_TEMPERATURE`].
    pub temperature: f32,
    /// Nucleus of sampling in (0, 1].
    pub top_p: f32,
    /// Makes sampling repeatable.
    pub seed: Option<u64>,
    /// How urgent it is.
    pub priority: Priority,
    /// The tenant that the request belongs to; empty: none.
    pub tenant: String,
    /// The further fields.
    pub options: Options,
    /// Which fields have a default of the protocol.
    pub left_out: LeftOut,
}

impl Asked {
    /// Takes from headers, or metadata, what they say for requests of any kind: the class where the request
    /// gives none itself, the tenant, the revision that must answer, and whether a gateway has found the
    /// model.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] that names the header.
    pub(crate) fn with_headers(self, headers: &HeaderMap) -> Result<Self, ApiError> {
        let (class, tenant) = (priority::of_headers(headers)?, tenant::of_headers(headers)?);
        let revision = revision::of_headers(headers)?.or(self.revision);
        let priority = self.priority.or(class);
        let model = revision::addressed(headers, self.model);
        Ok(Self { model, priority, revision, tenant: tenant.unwrap_or(self.tenant), ..self })
    }

    /// Fills in what was left out and checks what was given.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] that names the field.
    pub fn check(self, defaults: &Defaults) -> Result<Generation, ApiError> {
        let request = Generation {
            prompt: self.prompt,
            model: self.model.filter(|name| !name.is_empty()),
            revision: self.revision,
            max_tokens: self.max_tokens.unwrap_or(defaults.max_tokens),
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            seed: self.seed,
            priority: self.priority.unwrap_or_default(),
            tenant: self.tenant,
            options: self.options,
            left_out: LeftOut { temperature: self.temperature.is_none(), top_p: self.top_p.is_none() },
        };
        if request.prompt.is_empty() {
            return Err(ApiError::field(
                request.prompt.field(),
                "is empty: give what the model is to continue",
            ));
        }
        if request.max_tokens == 0 {
            return Err(ApiError::field("max_tokens", "0 asks for nothing: give 1 or more"));
        }
        if !(0.0..=MAX_TEMPERATURE).contains(&request.temperature) {
            let found = request.temperature;
            return Err(ApiError::field(
                "temperature",
                format!("{found} is not within 0 (greedy) to {MAX_TEMPERATURE}"),
            ));
        }
        if !(request.top_p > 0.0 && request.top_p <= 1.0) {
            let found = request.top_p;
            return Err(ApiError::field("top_p", format!("{found} is not above 0 and at most 1")));
        }
        Ok(request)
    }
}

impl TryFrom<v1::GenerateRequest> for Asked {
    type Error = ApiError;

    fn try_from(mut request: v1::GenerateRequest) -> Result<Self, ApiError> {
        Ok(Self {
            priority: priority::of_proto(request.priority)?,
            tenant: String::new(),
            options: Options::from(&mut request),
            prompt: prompt_of(request.prompt, request.prompt_tokens)?,
            model: Some(request.model),
            revision: None,
            max_tokens: Some(request.max_tokens).filter(|count| *count != 0),
            temperature: Some(request.temperature),
            top_p: Some(request.top_p).filter(|share| *share != 0.0),
            seed: request.seed,
        })
    }
}

/// The prompt of a message, in one of its two forms.
fn prompt_of(text: String, tokens: Option<v1::TokenIds>) -> Result<Prompt, ApiError> {
    match tokens {
        None => Ok(text.into()),
        Some(tokens) if text.is_empty() => Ok(Prompt::Tokens(tokens.ids)),
        Some(_) => Err(ApiError::field("prompt_tokens", "is given beside prompt: give one of them")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::Conversation;

    #[test]
    fn a_message_gives_its_prompt_in_one_form() {
        let ids = || Some(v1::TokenIds { ids: vec![3, 4] });
        assert_eq!(prompt_of(String::new(), ids()).unwrap(), Prompt::Tokens(vec![3, 4]));
        assert_eq!(prompt_of("a".into(), None).unwrap(), Prompt::from("a"));
        assert!(prompt_of("a".into(), ids()).unwrap_err().to_string().starts_with("prompt_tokens: "));
    }

    fn asked() -> Asked {
        Asked { prompt: "Hi".into(), ..Asked::default() }
    }

    #[test]
    fn missing_fields_take_the_defaults_of_the_protocol() {
        let http = asked().check(&HTTP_DEFAULTS).unwrap();
        assert_eq!((http.max_tokens, http.temperature, http.top_p), (100, 0.7, 0.9));
        let message = v1::GenerateRequest { prompt: "Hi".into(), ..Default::default() };
        let grpc = Asked::try_from(message).unwrap().check(&GRPC_DEFAULTS).unwrap();
        assert_eq!((grpc.max_tokens, grpc.temperature, grpc.top_p), (100, 0.0, 0.9));
        assert_eq!((grpc.model, grpc.seed), (None, None));
    }

    #[test]
    fn values_outside_their_limits_are_refused_by_name() {
        let cases = [
            ("prompt", Asked { prompt: "".into(), ..asked() }),
            ("prompt", Asked { prompt: Prompt::Tokens(Vec::new()), ..asked() }),
            ("messages", Asked { prompt: Conversation::default().into(), ..asked() }),
            ("max_tokens", Asked { max_tokens: Some(0), ..asked() }),
            ("temperature", Asked { temperature: Some(-0.1), ..asked() }),
            ("temperature", Asked { temperature: Some(f32::NAN), ..asked() }),
            ("temperature", Asked { temperature: Some(101.0), ..asked() }),
            ("top_p", Asked { top_p: Some(0.0), ..asked() }),
            ("top_p", Asked { top_p: Some(1.1), ..asked() }),
            ("top_p", Asked { top_p: Some(f32::NAN), ..asked() }),
        ];
        for (name, request) in cases {
            let error = request.check(&HTTP_DEFAULTS).unwrap_err();
            assert!(matches!(&error, ApiError::InvalidRequest { field: Some(field), .. } if field == name));
            assert!(error.to_string().starts_with(name), "{error}");
        }
    }
}
