package hbone

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"
)

// The benchmarks measure the tunnel against the limit, in the same run: a relay
// on crypto/tls with a connection and a handshake for each application's
// connection. Both have the same topology over loopback:
//
//	application - relay - TLS - relay - application

// route is one way from applications to the application's server.
type route struct {
	addr string // where applications connect
}

// worldOf starts an application's server that serve answers, and both routes to it.
func worldOf(b *testing.B, cfg Config, serve func(net.Conn)) (bare, ours route) {
	app := listen(b, func(c *net.TCPConn) { serve(c) })
	return bareRoute(b, app), tunnelRoute(b, cfg, app)
}

// listen calls serve for each connection, until the benchmark's end.
func listen(b *testing.B, serve func(*net.TCPConn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c.(*net.TCPConn))
		}
	}()
	return l.Addr().String()
}

func bareRoute(b *testing.B, app string) route {
	clientTLS, serverTLS := tlsConfigs()
	far := listen(b, func(raw *net.TCPConn) {
		t := tls.Server(raw, serverTLS)
		defer t.Close()
		if t.Handshake() != nil {
			return
		}
		c, err := net.Dial("tcp", app)
		if err != nil {
			return
		}
		defer c.Close()
		copyBoth(c.(*net.TCPConn), t)
	})
	return route{listen(b, func(c *net.TCPConn) {
		defer c.Close()
		raw, err := net.Dial("tcp", far)
		if err != nil {
			return
		}
		t := tls.Client(raw, clientTLS)
		defer t.Close()
		copyBoth(c, t)
	})}
}

func copyBoth(c *net.TCPConn, t *tls.Conn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(c, t)
		c.CloseWrite()
	}()
	io.Copy(t, c)
	t.CloseWrite()
	<-done
}

func tunnelRoute(b *testing.B, cfg Config, app string) route {
	to, err := net.ResolveTCPAddr("tcp", app)
	if err != nil {
		b.Fatal(err)
	}
	s := newSite(b, cfg, func(r *Request) {
		f, err := dialFile(to)
		if err != nil {
			r.Respond(503)
			return
		}
		defer f.Close()
		if s, err := r.Respond(200); err == nil {
			s.Relay(f)
		}
	})
	p := NewPool(cfg)
	b.Cleanup(p.Close)
	return route{listenFiles(b, func(f *os.File) {
		defer f.Close()
		s, _, err := p.Open(context.Background(), Key{}, s.dial, "192.0.2.1:80",
			RequestHeaders("k8s.namespace.name=default", `for="192.0.2.1:1"`, NewTraceparent(), ""))
		if err == nil {
			s.Relay(f)
		}
	})}
}

// compare runs both ways in turn, and reports their times and the ratio.
func compare(b *testing.B, bare, ours func() time.Duration, unit string, value func(time.Duration) float64) {
	bare()
	ours()
	var tb, to time.Duration
	n := 0
	for b.Loop() {
		tb += bare()
		to += ours()
		n++
	}
	vb, vo := value(tb/time.Duration(n)), value(to/time.Duration(n))
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(vb, "bare-"+unit)
	b.ReportMetric(vo, "ours-"+unit)
	b.ReportMetric(vo/vb, "ours/bare")
}

func BenchmarkThroughput(b *testing.B) {
	const total = 512 << 20
	for _, streams := range []int{1, 2, 8} {
		b.Run(map[int]string{1: "1 stream", 2: "2 streams", 8: "8 streams"}[streams], func(b *testing.B) {
			run := func(r route) func() time.Duration {
				return func() time.Duration { return send1(b, r, streams, total/streams) }
			}
			bare, ours := worldOf(b, DefaultConfig(), func(c net.Conn) {
				io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 128<<10))
				c.Write([]byte{1})
				c.Close()
			})
			compare(b, run(bare), run(ours), "MB/s", func(d time.Duration) float64 { return total / 1e6 / d.Seconds() })
		})
	}
}

// send1 sends size bytes on each of some connections, and waits until all have arrived.
func send1(b *testing.B, r route, streams, size int) time.Duration {
	conns := make([]net.Conn, streams)
	for i := range conns {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			b.Fatal(err)
		}
		conns[i] = c
	}
	start := time.Now()
	var w sync.WaitGroup
	for _, c := range conns {
		w.Add(1)
		go func() {
			defer w.Done()
			buf := make([]byte, 128<<10)
			for left := size; left > 0; left -= len(buf) {
				if _, err := c.Write(buf); err != nil {
					b.Error(err)
					return
				}
			}
			c.(*net.TCPConn).CloseWrite()
			if _, err := io.ReadFull(c, buf[:1]); err != nil {
				b.Error(err)
			}
		}()
	}
	w.Wait()
	d := time.Since(start)
	for _, c := range conns {
		c.Close()
	}
	return d
}

func BenchmarkLatency(b *testing.B) {
	const rounds = 5000
	bare, ours := worldOf(b, DefaultConfig(), func(c net.Conn) {
		defer c.Close()
		buf := make([]byte, 1024)
		for {
			if _, err := io.ReadFull(c, buf); err != nil {
				return
			}
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	})
	run := func(r route) func() time.Duration {
		c, err := net.Dial("tcp", r.addr)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		return func() time.Duration {
			buf := make([]byte, 1024)
			start := time.Now()
			for range rounds {
				if _, err := c.Write(buf); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Fatal(err)
				}
			}
			return time.Since(start)
		}
	}
	compare(b, run(bare), run(ours), "µs", func(d time.Duration) float64 { return d.Seconds() * 1e6 / rounds })
}

func BenchmarkConnections(b *testing.B) {
	const conns, workers = 1000, 8
	bare, ours := worldOf(b, DefaultConfig(), func(c net.Conn) {
		defer c.Close()
		var buf [1]byte
		if _, err := io.ReadFull(c, buf[:]); err == nil {
			c.Write(buf[:])
		}
		io.ReadFull(c, buf[:])
	})
	run := func(r route) func() time.Duration {
		return func() time.Duration {
			start := time.Now()
			var w sync.WaitGroup
			for range workers {
				w.Add(1)
				go func() {
					defer w.Done()
					for range conns / workers {
						c, err := net.Dial("tcp", r.addr)
						if err != nil {
							b.Error(err)
							return
						}
						buf := []byte{1}
						c.Write(buf)
						if _, err := io.ReadFull(c, buf); err != nil {
							b.Error(err)
						}
						c.Close()
					}
				}()
			}
			w.Wait()
			return time.Since(start)
		}
	}
	compare(b, run(bare), run(ours), "conns/s", func(d time.Duration) float64 { return conns / d.Seconds() })
}

// BenchmarkIdle reports what an idle stream and an idle tunnel hold in the heap
// and in stacks, both ends together, applications' ends not counted.
func BenchmarkIdle(b *testing.B) {
	for b.Loop() {
		b.ReportMetric(idle(b, 200, 1), "B/tunnel")
		b.ReportMetric(idle(b, 10, 90), "B/10-tunnels-with-90-streams/10")
	}
	b.ReportMetric(0, "ns/op")
}

// idle opens tunnels with streams that have moved a little, and returns the
// bytes in use for each tunnel.
func idle(b *testing.B, tunnels, streams int) float64 {
	var m0, m1 runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m0)
	s := newSite(b, DefaultConfig(), func(r *Request) {
		if st, err := r.Respond(200); err == nil {
			var buf [1000]byte
			io.ReadFull(st, buf[:])
			st.Write(buf[:])
			<-r.Context().Done()
		}
	})
	var ends []func()
	for range tunnels {
		cc, err := s.dial(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		ends = append(ends, func() { cc.Close(); <-cc.Done() })
		for range streams {
			st, _, err := cc.Open(context.Background(), "192.0.2.1:80", nil)
			if err != nil {
				b.Fatal(err)
			}
			buf := make([]byte, 1000)
			st.Write(buf)
			if _, err := io.ReadFull(st, buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	runtime.GC()
	runtime.GC() // pools too
	runtime.ReadMemStats(&m1)
	for _, end := range ends {
		end()
	}
	return float64(m1.HeapInuse+m1.StackInuse-m0.HeapInuse-m0.StackInuse) / float64(tunnels)
}
