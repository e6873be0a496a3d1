// The hub of gorilla/websocket's own chat example. Each connection has one goroutine that
// reads, one that writes, and a channel of 256 messages. Messages that wait in the channel
// are joined into one frame. A connection whose channel is full is dropped.
// We add rooms (the path) and a check of the token (HS256). As its documentation advises, a
// single message is sent as a PreparedMessage, and the write buffers come from a pool; they
// are large enough for joined messages. There is no storage.
package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"log"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

const (
	pongWait   = 60 * time.Second
	pingPeriod = pongWait * 9 / 10
	writeWait  = 10 * time.Second
)

var upgrader = websocket.Upgrader{
	ReadBufferSize: 1024, WriteBufferSize: 16384, WriteBufferPool: &sync.Pool{},
	CheckOrigin: func(*http.Request) bool { return true },
}

type message struct {
	text     []byte
	prepared *websocket.PreparedMessage
}

type client struct {
	conn *websocket.Conn
	hub  *hub
	send chan *message
}

type hub struct {
	broadcast            chan *message
	register, unregister chan *client
}

type rooms struct{ find chan request }

type request struct {
	name  string
	reply chan *hub
}

func (h *hub) run() {
	clients := map[*client]bool{}
	leave := func(c *client) {
		if clients[c] {
			delete(clients, c)
			close(c.send)
		}
	}
	for {
		select {
		case c := <-h.register:
			clients[c] = true
		case c := <-h.unregister:
			leave(c)
		case m := <-h.broadcast:
			for c := range clients {
				select {
				case c.send <- m:
				default:
					leave(c)
				}
			}
		}
	}
}

func (c *client) readPump() {
	defer func() {
		c.hub.unregister <- c
		c.conn.Close()
	}()
	c.conn.SetReadLimit(65536)
	c.conn.SetReadDeadline(time.Now().Add(pongWait))
	c.conn.SetPongHandler(func(string) error {
		return c.conn.SetReadDeadline(time.Now().Add(pongWait))
	})
	for {
		_, text, err := c.conn.ReadMessage()
		if err != nil {
			return
		}
		prepared, err := websocket.NewPreparedMessage(websocket.TextMessage, text)
		if err != nil {
			return
		}
		c.hub.broadcast <- &message{text, prepared}
	}
}

func (c *client) write(m *message) error {
	c.conn.SetWriteDeadline(time.Now().Add(writeWait))
	waiting := len(c.send)
	if waiting == 0 {
		return c.conn.WritePreparedMessage(m.prepared)
	}
	w, err := c.conn.NextWriter(websocket.TextMessage)
	if err != nil {
		return err
	}
	w.Write(m.text)
	for ; waiting > 0; waiting-- {
		m, open := <-c.send
		if !open {
			break
		}
		w.Write([]byte{'\n'})
		w.Write(m.text)
	}
	return w.Close()
}

func (c *client) writePump() {
	ticker := time.NewTicker(pingPeriod)
	defer func() {
		ticker.Stop()
		c.conn.Close()
	}()
	for {
		select {
		case m, open := <-c.send:
			if !open || c.write(m) != nil {
				return
			}
		case <-ticker.C:
			c.conn.SetWriteDeadline(time.Now().Add(writeWait))
			if c.conn.WriteMessage(websocket.PingMessage, nil) != nil {
				return
			}
		}
	}
}

func valid(token string, secret []byte) bool {
	end := strings.LastIndexByte(token, '.')
	start := strings.IndexByte(token, '.')
	if end <= start {
		return false
	}
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(token[:end]))
	signature, err := base64.RawURLEncoding.DecodeString(token[end+1:])
	if err != nil || !hmac.Equal(signature, mac.Sum(nil)) {
		return false
	}
	var claims struct{ Exp int64 }
	body, err := base64.RawURLEncoding.DecodeString(token[start+1 : end])
	return err == nil && json.Unmarshal(body, &claims) == nil &&
		claims.Exp > time.Now().Unix()
}

func main() {
	secret := []byte(os.Getenv("BENCH_SECRET"))
	all := rooms{make(chan request)}
	go func() {
		hubs := map[string]*hub{}
		for r := range all.find {
			h := hubs[r.name]
			if h == nil {
				h = &hub{make(chan *message), make(chan *client), make(chan *client)}
				hubs[r.name] = h
				go h.run()
			}
			r.reply <- h
		}
	}()
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if !valid(r.URL.Query().Get("token"), secret) {
			http.Error(w, "token", http.StatusUnauthorized)
			return
		}
		conn, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		reply := make(chan *hub)
		all.find <- request{r.URL.Path, reply}
		c := &client{conn, <-reply, make(chan *message, 256)}
		c.hub.register <- c
		go c.writePump()
		go c.readPump()
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}
