// Node's `ws`. Rooms by path, and a check of the token (HS256); no storage. Compression is
// off and the optional bufferutil is installed, as its documentation advises.
'use strict';
const crypto = require('crypto');
const http = require('http');
const { WebSocketServer } = require('ws');

const secret = process.env.BENCH_SECRET;
const rooms = new Map();
const server = http.createServer((request, response) => response.writeHead(404).end());
const sockets = new WebSocketServer({ noServer: true, perMessageDeflate: false });

function valid(token) {
  const [head, body, signature] = token.split('.');
  const right = crypto.createHmac('sha256', secret).update(`${head}.${body}`).digest();
  const given = Buffer.from(signature || '', 'base64url');
  return given.length === right.length && crypto.timingSafeEqual(given, right) &&
    JSON.parse(Buffer.from(body, 'base64url')).exp > Date.now() / 1000;
}

server.on('upgrade', (request, socket, head) => {
  const url = new URL(request.url, 'http://localhost');
  if (!valid(url.searchParams.get('token') || '')) {
    socket.end('HTTP/1.1 401 Unauthorized\r\nConnection: close\r\n\r\n');
    return;
  }
  sockets.handleUpgrade(request, socket, head, (ws) => {
    let room = rooms.get(url.pathname);
    if (!room) rooms.set(url.pathname, room = new Set());
    room.add(ws);
    ws.on('message', (data) => {
      for (const member of room) member.send(data, { binary: false });
    });
    ws.on('close', () => room.delete(ws));
    ws.on('error', () => ws.terminate());
  });
});
server.listen({ host: '127.0.0.1', port: Number(process.argv[2]), backlog: 4096 });
