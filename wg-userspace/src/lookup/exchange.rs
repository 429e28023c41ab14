//! One request and its answer, on a connection of its own.
//!
//! A connection on a Unix socket costs some ten microseconds. To keep one open would save that, and
//! make it a question whether a request that failed had reached anybody.

use std::pin::pin;

use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use zeroize::Zeroizing;

use super::LookupError;

/// Longest body of an answer.
pub(super) const BODY_LEN_MAX: usize = 64 << 10;
/// Longest head of an answer, in bytes.
const HEAD_LEN_MAX: usize = 16 << 10;
const HEADER_COUNT_MAX: usize = 64;

/// Sends a request to the service on `stream`; gives the answer's status, and its body if that is 200.
pub(super) async fn exchange(
    stream: UnixStream,
    method: Method,
    path: &str,
    body: String,
) -> Result<(StatusCode, Zeroizing<Vec<u8>>), LookupError> {
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD_LEN_MAX)
        .max_headers(HEADER_COUNT_MAX)
        .handshake::<_, String>(TokioIo::new(stream))
        .await?;
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "localhost")
        .header(header::CONNECTION, "close");
    if !body.is_empty() {
        request = request.header(header::CONTENT_TYPE, "text/plain");
    }
    let request = request.body(body).expect("a path of base64 is a URI");
    let mut answer = pin!(async move {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = match status {
            StatusCode::OK => read(response.into_body()).await?,
            _ => Zeroizing::default(),
        };
        Ok((status, body))
    });
    tokio::select! {
        answered = &mut answer => answered,
        // It may end before its last bytes are read here.
        _ = connection => answer.await,
    }
}

/// Reads a body to its end.
async fn read(mut body: Incoming) -> Result<Zeroizing<Vec<u8>>, LookupError> {
    let expected = body.size_hint().upper().unwrap_or(BODY_LEN_MAX as u64);
    if body.size_hint().exact().is_some_and(|len| len > BODY_LEN_MAX as u64) {
        return Err(LookupError::TooLong);
    }
    // As much as it can become: a text that moved would leave a copy behind.
    let capacity = usize::try_from(expected).unwrap_or(BODY_LEN_MAX).min(BODY_LEN_MAX);
    let mut text = Zeroizing::new(Vec::with_capacity(capacity));
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        if text.len() + data.len() > capacity {
            return Err(LookupError::TooLong);
        }
        text.extend_from_slice(&data);
    }
    Ok(text)
}
