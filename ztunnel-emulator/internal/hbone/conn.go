package hbone

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// initialWindow and minMaxFrame are HTTP/2's numbers before SETTINGS (RFC 9113,
// 6.5.2).
const (
	initialWindow = 65535
	minMaxFrame   = 16384
	maxWindow     = 1<<31 - 1
)

// conn is what both ends of a tunnel have in common.
//
// Locks: wmu (writing) is taken before mu (streams and windows), a stream's own
// mu before the connection's. The read loop takes neither wmu nor waits for
// anything but bytes: two ends that both wait to write would never read.
type conn struct {
	cfg    Config
	server bool
	wire   *wire
	tls    *tls.Conn // nil for a connection without TLS
	plain  io.ReadWriter

	in      reader        // belongs to the read loop
	fr      *http2.Framer // reads from in
	calm    calm          // what a peer may do too often
	crossed uint32        // resets of streams that were over; one for each is no offence

	wmu     sync.Mutex
	writers atomic.Int32 // who holds or waits for wmu
	henc    *hpack.Encoder
	hbuf    bytes.Buffer
	table   atomic.Int64 // a header table size to be taken over by henc; -1 for none

	ctlMu    sync.Mutex
	ctl      bytes.Buffer // control frames to be written
	ctlFr    *http2.Framer
	flushing bool // flushControl runs
	ctlOver  bool // no flushControl may start any more

	mu         sync.Mutex
	streams    map[uint32]*Stream
	relaying   map[*Stream]struct{}
	sendWindow int64     // what we may send
	recvWindow int64     // what the peer may send
	owed       int64     // taken, and not yet given back to recvWindow
	queued     int64     // waiting for applications, in all streams
	held       int64     // of queued, what is given back only when it was taken
	peerWindow int64     // the send window of a new stream
	peerMax    uint32    // streams the peer allows
	blocked    []*Stream // waiting for sendWindow
	nextID     uint32    // client: the next stream's
	lastID     uint32    // server: the last stream's the peer opened
	servedID   uint32    // server: the last that is served, once a drain is final
	goingAway  bool      // the peer sent GOAWAY
	draining   drainState
	err        error

	peerFrame atomic.Uint32 // the largest frame the peer accepts
	pings     pinger

	onStream func(*conn, *http2.MetaHeadersFrame) error // HEADERS of a stream not known
	work     sync.WaitGroup                             // flushers
	done     chan struct{}                              // closed when nothing is left
	onDone   func()                                     // called after that; guarded by mu
	over     bool                                       // it was, or would have been
}

// drainState is how far a graceful end is.
type drainState int

const (
	notDraining drainState = iota
	drainAnnounced
	drainFinal // no new streams; the connection ends with the last one
	drainClosed
)

func newConn(w *wire, t *tls.Conn, cfg Config, server bool) *conn {
	c := &conn{
		cfg: cfg, server: server, wire: w, tls: t,
		streams:    map[uint32]*Stream{},
		relaying:   map[*Stream]struct{}{},
		sendWindow: initialWindow,
		recvWindow: int64(cfg.ConnWindow),
		peerWindow: initialWindow,
		peerMax:    uint32(cfg.MaxStreamsPerConn),
		nextID:     1,
		done:       make(chan struct{}),
	}
	c.plain = w
	if t != nil {
		c.plain = t
	}
	c.in = reader{wire: w, from: c.plain}
	c.peerFrame.Store(minMaxFrame)
	c.table.Store(-1)
	c.fr = http2.NewFramer(nil, &c.in)
	c.fr.SetMaxReadFrameSize(uint32(max(cfg.MaxFrame, minMaxFrame)))
	c.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.fr.MaxHeaderListSize = uint32(cfg.ClientMaxHeaderList)
	if server {
		c.fr.MaxHeaderListSize = uint32(cfg.ServerMaxHeaderList)
	}
	c.henc = hpack.NewEncoder(&c.hbuf)
	c.ctlFr = http2.NewFramer(&c.ctl, nil)
	c.calm.init(cfg)
	return c
}

// settings is what we tell the peer first.
func (c *conn) settings() []http2.Setting {
	s := []http2.Setting{
		{ID: http2.SettingInitialWindowSize, Val: uint32(c.cfg.StreamWindow)},
		{ID: http2.SettingMaxFrameSize, Val: uint32(max(c.cfg.MaxFrame, minMaxFrame))},
	}
	if c.server {
		return append(s,
			http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: uint32(c.cfg.ServerMaxStreams)},
			http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: uint32(c.cfg.ServerMaxHeaderList)})
	}
	return append(s,
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: uint32(c.cfg.ClientMaxHeaderList)})
}

// sayHello writes our preface: a client's magic, SETTINGS, and the connection's
// window.
func (c *conn) sayHello() error {
	c.ctlMu.Lock()
	if !c.server {
		c.ctl.WriteString(http2.ClientPreface)
	}
	c.ctlFr.WriteSettings(c.settings()...)
	if more := c.cfg.ConnWindow - initialWindow; more > 0 {
		c.ctlFr.WriteWindowUpdate(0, uint32(more))
	}
	c.ctlMu.Unlock()
	c.lockWrite()
	return c.unlockWrite()
}

// run reads until the connection ends, and cleans up behind it.
func (c *conn) run() {
	c.pings.start(c)
	err := c.readLoop()
	c.fail(err)
	c.pings.stop()
	c.in.release()
	c.ctlMu.Lock()
	c.ctlOver = true
	c.ctlMu.Unlock()
	c.work.Wait()
	c.wire.release()
	close(c.done)
	c.mu.Lock()
	f := c.onDone
	c.onDone = nil
	c.over = true
	c.mu.Unlock()
	if f != nil {
		f()
	}
}

// fail ends the connection and all its streams with err. Only the first counts.
func (c *conn) fail(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	lastID := c.lastID
	if c.draining >= drainFinal {
		lastID = c.servedID // a GOAWAY takes back no more than the one before
	}
	orderly := c.draining == drainClosed
	streams := make([]*Stream, 0, len(c.streams))
	for _, s := range c.streams {
		streams = append(streams, s)
	}
	var late []*Stream // ended on the wire, their last bytes still on the way to the application
	for s := range c.relaying {
		if c.streams[s.id] != s {
			late = append(late, s)
		}
	}
	clear(c.streams)
	c.blocked = nil
	c.mu.Unlock()

	for _, s := range streams {
		s.withConn.Store(true)
		s.finish(err, endsQuietly(err))
		s.removed()
	}
	if err == ErrClosed {
		for _, s := range late {
			s.withConn.Store(true)
			s.finish(err, false)
		}
	}
	c.farewell(err, lastID, orderly)
}

// farewell says GOAWAY if it can be said without waiting for long, and closes
// the socket: that wakes everybody.
func (c *conn) farewell(err error, lastID uint32, orderly bool) {
	if !endsQuietly(err) && !orderly {
		code := http2.ErrCodeNo
		if ce, ok := err.(*ConnError); ok && !ce.Remote {
			code = ce.Code
		}
		c.ctlMu.Lock()
		c.ctlFr.WriteGoAway(lastID, code, nil)
		c.ctlMu.Unlock()
	}
	c.wire.Conn.SetWriteDeadline(time.Now().Add(farewellTime))
	// A writer that is stuck at a peer that doesn't read gives up by then.
	c.wmu.Lock()
	c.takeControl()
	c.sayEnd()
	c.wmu.Unlock()
	c.wire.Close()
}

// sayEnd writes what was collected, and TLS's end of the bytes. wmu is held.
func (c *conn) sayEnd() error {
	if c.tls != nil {
		c.tls.CloseWrite() // close_notify
	}
	return c.wire.flush()
}

// farewellTime is how long a GOAWAY may take.
const farewellTime = 500 * time.Millisecond

// Close ends the connection and its streams at once; the streams get ErrClosed.
// Done tells when nothing is left of it.
func (c *conn) Close() error {
	c.fail(ErrClosed)
	return nil
}

// Done is closed when the connection has ended and nothing of it is left.
func (c *conn) Done() <-chan struct{} { return c.done }

// Err is why the connection ended, nil while it lives.
func (c *conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// ConnectionState is TLS's; zero without TLS.
func (c *conn) ConnectionState() tls.ConnectionState {
	if c.tls == nil {
		return tls.ConnectionState{}
	}
	return c.tls.ConnectionState()
}

// LocalAddr and RemoteAddr are the socket's.
func (c *conn) LocalAddr() net.Addr  { return c.wire.LocalAddr() }
func (c *conn) RemoteAddr() net.Addr { return c.wire.RemoteAddr() }

// Streams is how many streams are open.
func (c *conn) Streams() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams)
}
