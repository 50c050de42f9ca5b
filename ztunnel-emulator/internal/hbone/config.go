// Package hbone is the tunnel: TLS below, HTTP/2 CONNECT above, and the pool of
// tunnels a sender shares.
//
// A connection is taken over when it is connected; sockets are made by the
// caller, in the pod. Of x/net/http2 only the Framer and hpack are used. DATA is
// parsed and written here: a frame's payload goes from the read loop straight to
// the application's socket, and a chunk of the application's bytes becomes a
// frame in the buffer it was read into. What the real system does is in
// reference/hbone.md, sections 2 and 3.
package hbone

import "time"

// Config holds a connection's numbers. The zero value is not useful: start from
// DefaultConfig.
type Config struct {
	StreamWindow int // bytes a peer may send on one stream before we take them
	ConnWindow   int // the same for all streams of a connection together
	MaxFrame     int // largest frame we accept, in bytes

	ClientMaxHeaderList int // what a client accepts in one response's headers, in bytes
	ServerMaxHeaderList int // what a server accepts in one request's headers, in bytes

	ServerMaxStreams  int // streams at once a server allows
	MaxStreamsPerConn int // streams at once a client opens on one connection (POOL_MAX_STREAMS_PER_CONNECTION)
	MaxQueued         int // bytes waiting for slow applications before the connection's window is held back
	MaxControl        int // bytes of control frames waiting for a peer that does not read

	PingInterval time.Duration // from one pong to the next ping
	PingTimeout  time.Duration // from a ping to a dead connection
	// HandshakeTimeout bounds TLS and the HTTP/2 preface. The real system has
	// none; a peer that says nothing must not cost a descriptor for ever.
	HandshakeTimeout time.Duration
	UnusedTimeout    time.Duration // how long the pool keeps a tunnel since its last use
	PoolSize         int           // tunnels the pool remembers
}

// DefaultConfig is ztunnel's.
func DefaultConfig() Config {
	return Config{
		StreamWindow:        4 << 20,
		ConnWindow:          16 << 20,
		MaxFrame:            1 << 20,
		ClientMaxHeaderList: 16 << 10,
		ServerMaxHeaderList: 64 << 10,
		ServerMaxStreams:    200,
		MaxStreamsPerConn:   100,
		MaxQueued:           64 << 20,
		MaxControl:          128 << 10,
		PingInterval:        10 * time.Second,
		PingTimeout:         20 * time.Second,
		HandshakeTimeout:    10 * time.Second,
		UnusedTimeout:       5 * time.Minute,
		PoolSize:            500,
	}
}
