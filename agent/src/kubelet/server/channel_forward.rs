//! Ports over a WebSocket's channels (`v4.channel.k8s.io`): for the n-th port, channel 2n carries data and 2n+1 an error;
//! the first frame of each names the port.

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::sync::mpsc;

use super::channel::{Protocol, Socket};
use crate::kubelet::context::Context;

const CHUNK: usize = 32 * 1024;

/// Connects to the ports and copies until all connections, or the client, have ended.
pub async fn forward(context: &Context, socket: Socket, protocol: Protocol, sandbox: &str, ports: &[u16]) {
    let (mut sink, mut source) = socket.split();
    let (frames, mut outgoing) = mpsc::channel::<(u8, Bytes)>(8);
    let mut writers = Vec::new();
    for (index, port) in ports.iter().enumerate() {
        let data = u8::try_from(index * 2).unwrap_or(0);
        for channel in [data, data + 1] {
            if sink.send(protocol.encode(channel, &port.to_le_bytes())).await.is_err() {
                return;
            }
        }
        match context.runtime.port_forward(sandbox, *port).await {
            Ok(stream) => {
                let (reader, writer) = TcpStream::into_split(stream);
                tokio::spawn(pump(reader, data, frames.clone()));
                writers.push(Some(writer));
            }
            Err(error) => {
                writers.push(None);
                let text = format!("error forwarding port {port} to pod {sandbox}: {error}");
                if sink.send(protocol.encode(data + 1, text.as_bytes())).await.is_err() {
                    return;
                }
            }
        }
    }
    drop(frames);
    let outward = async {
        while let Some((channel, data)) = outgoing.recv().await {
            if sink.send(protocol.encode(channel, &data)).await.is_err() {
                return;
            }
        }
        // Every connection has ended.
        let _ = sink.send(crate::websocket::goodbye()).await;
    };
    let inward = async {
        while let Some(Ok(message)) = source.next().await {
            if message.is_close() {
                return;
            }
            let Some((channel, data)) = protocol.decode(&message) else { continue };
            if let Some(Some(writer)) = writers.get_mut(usize::from(channel / 2)).filter(|_| channel % 2 == 0)
                && writer.write_all(&data).await.is_err()
            {
                writers[usize::from(channel / 2)] = None;
            }
        }
    };
    tokio::select! {
        () = outward => {}
        () = inward => {}
    }
}

async fn pump(mut reader: OwnedReadHalf, channel: u8, frames: mpsc::Sender<(u8, Bytes)>) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(read) = reader.read(&mut buffer).await {
        if read == 0 || frames.send((channel, Bytes::copy_from_slice(&buffer[..read]))).await.is_err() {
            return;
        }
    }
}
