//! Finds the model that a request names, in as little of its body as possible.
//!
//! | where the name is | what is read |
//! |---|---|
//! | in the path | nothing of the body |
//! | in a field of a JSON body | up to the field |
//! | in a field of the first message, over gRPC and gRPC-Web | up to the field |
//! | in a compressed body or message | what is compressed is there in full, and is decoded up to the field |
//!
//! The bytes of the body are never changed: what was decoded is thrown away, and the pod decodes it again.

mod decoded;
mod json_scan;
mod message_scan;

use http::HeaderMap;
use trustformers_api::surfaces::{ModelPlace, Surface};
use trustformers_proto::MODEL_HEADER;

use crate::base64_stream::Base64Stream;
use crate::error::{Echo, GatewayError};
use crate::wire::Wire;

pub(crate) use decoded::{name_in_encoded_json, name_in_encoded_message};
use json_scan::JsonScan;
use message_scan::MessageScan;

/// Longer names are not looked for: Kubernetes' names of a namespace and an object have 63 and 253
/// characters, and an adapter's name follows.
const MAX_NAME_BYTES: usize = 512;

/// The refusal of a body in which no name can be found.
fn malformed(text: &str) -> GatewayError {
    GatewayError::Malformed(Echo::new(text))
}

/// A search for the name in one body.
#[derive(Debug)]
pub(crate) enum NameFinder {
    /// It does not stand in the body.
    Known(String),
    /// In a JSON object.
    Json(JsonFinder),
    /// In the first message.
    Message(MessageFinder),
    /// In a JSON object that is compressed as a whole.
    EncodedJson,
}

/// A search in a JSON object.
#[derive(Debug, Default)]
pub(crate) struct JsonFinder(JsonScan);

/// A search in the first message of gRPC.
#[derive(Debug)]
pub(crate) struct MessageFinder {
    scan: MessageScan,
    /// The encoding of compressed messages, where the request names one.
    encoding: Option<String>,
    /// Decodes the text of gRPC-Web.
    text: Option<Base64Stream>,
}

/// A message to be decompressed, and how it is compressed.
#[derive(Debug)]
pub(crate) struct CompressedMessage {
    /// The compressed bytes.
    pub(crate) bytes: Vec<u8>,
    /// The name of its encoding.
    pub(crate) encoding: String,
}

/// Where a request names its model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NamePlace<'a> {
    /// The row of the table of surfaces.
    pub(crate) surface: &'static Surface,
    /// The caller's protocol.
    pub(crate) wire: Wire,
    /// The path of the request.
    pub(crate) path: &'a str,
    /// Its headers.
    pub(crate) headers: &'a HeaderMap,
}

impl NameFinder {
    /// A search for what this row of the table of surfaces names.
    ///
    /// # Errors
    /// The body is compressed in a way that is not known; the path is not a text.
    pub(crate) fn new(place: NamePlace<'_>) -> Result<Self, GatewayError> {
        let NamePlace { surface, wire, path, headers } = place;
        let encoded = trustformers_api::encoding::is_encoded(headers)
            .map_err(|_| GatewayError::Encoded(Echo::of_bytes(content_encoding(headers))))?;
        match surface.model {
            ModelPlace::PathSegment => name_in_path(surface, path).map(Self::Known),
            ModelPlace::JsonField | ModelPlace::FirstMessage { fields: [] } if encoded => {
                Ok(Self::EncodedJson)
            }
            ModelPlace::JsonField | ModelPlace::FirstMessage { fields: [] } => {
                Ok(Self::Json(JsonFinder::default()))
            }
            ModelPlace::ProtoField(1) => Self::in_message(&[1], wire, headers, encoded),
            ModelPlace::ProtoField(_) => Self::in_message(&[5], wire, headers, encoded),
            ModelPlace::FirstMessage { fields } => Self::in_message(fields, wire, headers, encoded),
            ModelPlace::Nowhere => Ok(Self::Known(String::new())),
        }
    }

    fn in_message(
        fields: &'static [u32],
        wire: Wire,
        headers: &HeaderMap,
        encoded: bool,
    ) -> Result<Self, GatewayError> {
        if encoded {
            // gRPC compresses messages and not the body around them.
            return Err(GatewayError::Encoded(Echo::of_bytes(content_encoding(headers))));
        }
        let encoding = headers.get("grpc-encoding").and_then(|name| name.to_str().ok());
        Ok(Self::Message(MessageFinder {
            scan: MessageScan::new(fields),
            encoding: encoding.filter(|name| *name != "identity").map(str::to_owned),
            text: (wire == Wire::GrpcWebText).then(Base64Stream::default),
        }))
    }

    /// Takes the next bytes of the body.
    ///
    /// # Errors
    /// The body can't be what the row says.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), GatewayError> {
        match self {
            Self::Known(_) | Self::EncodedJson => Ok(()),
            Self::Json(JsonFinder(scan)) => scan.push(bytes),
            Self::Message(MessageFinder { scan, .. }) if scan.is_found() => Ok(()),
            Self::Message(MessageFinder { scan, text: None, .. }) => scan.push(bytes),
            Self::Message(MessageFinder { scan, text: Some(text), .. }) => {
                let mut decoded = Vec::with_capacity(bytes.len() / 4 * 3 + 3);
                let outcome = text.decode(bytes, &mut decoded);
                scan.push(&decoded)?;
                outcome.map_err(|_| malformed("its text is not base64"))
            }
        }
    }

    /// Whether the name is known, or is known to be missing.
    pub(crate) fn is_found(&self) -> bool {
        match self {
            Self::Known(_) => true,
            Self::Json(JsonFinder(scan)) => scan.is_found(),
            Self::Message(MessageFinder { scan, .. }) => scan.is_found(),
            Self::EncodedJson => false,
        }
    }

    /// Whether the name can be found before the body has ended.
    pub(crate) fn finds_early(&self) -> bool {
        !matches!(self, Self::EncodedJson)
    }

    /// The first message, where it is compressed and complete. [`Self::decompressed`] has to follow.
    ///
    /// # Errors
    /// The request does not say how it is compressed.
    pub(crate) fn take_compressed(&mut self) -> Result<Option<CompressedMessage>, GatewayError> {
        let Self::Message(MessageFinder { scan, encoding, .. }) = self else { return Ok(None) };
        let Some(bytes) = scan.take_compressed() else { return Ok(None) };
        match encoding {
            Some(encoding) => Ok(Some(CompressedMessage { bytes, encoding: encoding.clone() })),
            None => Err(malformed("its gRPC message is compressed, but grpc-encoding names no encoding")),
        }
    }

    /// The numbers of the fields that lead to the name in a message.
    pub(crate) fn fields(&self) -> &'static [u32] {
        match self {
            Self::Message(MessageFinder { scan, .. }) => scan.numbers(),
            _ => &[],
        }
    }

    /// The name that the decompressed message has.
    pub(crate) fn decompressed(&mut self, name: String) {
        if let Self::Message(MessageFinder { scan, .. }) = self {
            scan.decompressed(name);
        }
    }

    /// The name, once it is found or the body has ended; empty where the request names no model. What is
    /// compressed as a whole has to be looked into with [`name_in_encoded_json`].
    ///
    /// # Errors
    /// The body ended too early.
    pub(crate) fn finish(&mut self) -> Result<String, GatewayError> {
        match std::mem::replace(self, Self::Known(String::new())) {
            Self::Known(name) => Ok(name),
            Self::Json(JsonFinder(scan)) => scan.finish(),
            Self::Message(MessageFinder { scan, .. }) => scan.finish(),
            Self::EncodedJson => Ok(String::new()),
        }
    }

    /// What watches the rest of a body whose name is found: a JSON object must not name a second model behind
    /// the first, because the pod would believe the last one.
    pub(crate) fn watching(self) -> Self {
        match self {
            watching @ Self::Json(_) => watching,
            _ => Self::Known(String::new()),
        }
    }

    /// The name, once it is found.
    pub(crate) fn found(&self) -> Option<String> {
        match self {
            Self::Known(name) => Some(name.clone()),
            Self::Json(JsonFinder(scan)) => scan.name().map(str::to_owned),
            Self::Message(MessageFinder { scan, .. }) => scan.name().map(str::to_owned),
            Self::EncodedJson => None,
        }
    }
}

fn content_encoding(headers: &HeaderMap) -> &[u8] {
    let mut named = headers.get_all(http::header::CONTENT_ENCODING).iter().map(http::HeaderValue::as_bytes);
    named.find(|name| !name.eq_ignore_ascii_case(b"identity")).unwrap_or_default()
}

/// The model in a path, decoded.
///
/// # Errors
/// It is not UTF-8.
pub(crate) fn name_in_path(surface: &Surface, path: &str) -> Result<String, GatewayError> {
    let written = surface.model_in_path(path).unwrap_or_default();
    let decoded = percent_encoding::percent_decode_str(written).decode_utf8();
    decoded.map(std::borrow::Cow::into_owned).map_err(|_| malformed("the model in its path is not UTF-8"))
}

/// The model that is meant: the one that the request names, else that of the header, which a proxy sets for a
/// model's own host name. Empty if neither names one.
pub(crate) fn or_in_header<'a>(name: &'a str, headers: &'a HeaderMap) -> &'a str {
    if !name.is_empty() {
        return name;
    }
    headers.get(MODEL_HEADER).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use trustformers_api::surfaces::{grpc_surface, http_surface};

    fn finder(
        method: &str,
        path: &str,
        headers: &[(&'static str, &'static str)],
    ) -> Result<NameFinder, GatewayError> {
        let headers: HeaderMap = headers
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), http::HeaderValue::from_static(value)))
            .collect();
        let surface = if method == "gRPC" { grpc_surface(path) } else { http_surface(method, path) };
        NameFinder::new(NamePlace {
            surface: surface.unwrap(),
            wire: Wire::of(&headers),
            path,
            headers: &headers,
        })
    }

    #[test]
    fn the_row_says_where_the_name_is() {
        for (path, name) in [
            ("/v2/models/ns%2Fa/infer", "ns/a"),
            ("/v2/models/ns/a/versions/r1/infer", "ns/a"),
            ("/v2/models/ns/a/generate_stream", "ns/a"),
        ] {
            let mut known = finder("POST", path, &[]).unwrap();
            assert!(known.is_found());
            assert_eq!(known.finish().unwrap(), name);
        }
        assert_eq!(finder("POST", "/v2/models/%ff/infer", &[]).unwrap_err().kind(), "invalid_request");
        let mut json = finder("POST", "/openai/v1/chat/completions", &[]).unwrap();
        json.push(br#"{"messages": [], "model": "m""#).unwrap();
        assert_eq!(json.found().as_deref(), Some("m"));
    }

    #[test]
    fn the_text_of_grpc_web_is_decoded() {
        let path = "/trustformers.v1.InferenceService/Generate";
        let mut web = finder("gRPC", path, &[("content-type", "application/grpc-web-text")]).unwrap();
        // A head of five bytes, and a message with field 5: "m".
        for piece in ["AAA", "AAAMqA", "W0=", "rest"] {
            web.push(piece.as_bytes()).unwrap();
        }
        assert_eq!(web.finish().unwrap(), "m");
        let mut bad = finder("gRPC", path, &[("content-type", "application/grpc-web-text")]).unwrap();
        assert_eq!(bad.push(b"{}").unwrap_err().kind(), "invalid_request");
    }

    #[test]
    fn unknown_encodings_are_refused_by_name() {
        for encoding in ["compress", "gzip, br"] {
            let error = finder("POST", "/v1/generate", &[("content-encoding", encoding)]).unwrap_err();
            assert_eq!(error.kind(), "unsupported_encoding");
            assert!(error.to_string().contains(encoding), "{error}");
        }
        let known = finder("POST", "/v1/generate", &[("content-encoding", "gzip")]).unwrap();
        assert!(matches!(known, NameFinder::EncodedJson) && !known.finds_early());
        let path = "/trustformers.v1.InferenceService/Generate";
        let headers = [("content-type", "application/grpc"), ("content-encoding", "gzip")];
        assert_eq!(finder("gRPC", path, &headers).unwrap_err().kind(), "unsupported_encoding");
    }

    #[test]
    fn a_compressed_message_needs_the_name_of_its_encoding() {
        let path = "/trustformers.v1.InferenceService/Generate";
        let mut finder = finder("gRPC", path, &[("content-type", "application/grpc")]).unwrap();
        finder.push(&[1, 0, 0, 0, 1, 9]).unwrap();
        assert_eq!(finder.take_compressed().unwrap_err().kind(), "invalid_request");
    }
}
