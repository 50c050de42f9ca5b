package dns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	miekg "github.com/miekg/dns"
)

var threeServers = []netip.AddrPort{
	netip.MustParseAddrPort("192.0.2.1:53"), netip.MustParseAddrPort("192.0.2.2:53"), netip.MustParseAddrPort("192.0.2.3:53"),
}

// When each server is asked, and when all of it ends, by a clock of its own.
func TestPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var mu sync.Mutex
		var asked []string
		mute := func(server netip.AddrPort, conn net.Conn) {
			for buf := make([]byte, 512); ; {
				if _, err := conn.Read(buf); err != nil {
					return
				}
				mu.Lock()
				asked = append(asked, fmt.Sprint(server.Addr(), time.Since(start).Round(time.Millisecond)))
				mu.Unlock()
			}
		}
		f := &Forwarder{Resolvers: Resolvers{Servers: threeServers}, Dial: pipeDialer(mute)}
		got := f.Answer(t.Context(), newQuery("example.com.", 0), "udp")
		if took := time.Since(start).Round(time.Millisecond); rcodeOf(got) != miekg.RcodeServerFailure || took != 5*time.Second {
			t.Errorf("%x after %v", got, took)
		}
		want := "[192.0.2.1 0s 192.0.2.2 833ms 192.0.2.3 1.667s 192.0.2.1 2.5s 192.0.2.2 3.333s 192.0.2.3 4.167s]"
		mu.Lock()
		order := fmt.Sprint(asked)
		mu.Unlock()
		if order != want {
			t.Errorf("asked %s, want %s", order, want)
		}

		// The end of the pod is the end of the wait.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start = time.Now()
		for _, network := range []string{"udp", "tcp"} {
			f.Answer(ctx, newQuery("example.com.", 0), network)
			if took := time.Since(start); took != time.Second {
				t.Errorf("over %s: ended after %v", network, took)
			}
		}
	})
}

// A slow answer is an answer, though the others have had their turn, and so is
// one to a query that was sent twice.
func TestSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := func(server netip.AddrPort, conn net.Conn) {
			buf := make([]byte, 512)
			n, _ := conn.Read(buf)
			if server == threeServers[0] {
				go io.Copy(io.Discard, conn) // the second attempt
				time.Sleep(4900 * time.Millisecond)
				conn.Write(answerTo(buf[:n], miekg.RcodeSuccess, 0))
			}
			io.Copy(io.Discard, conn)
		}
		f := &Forwarder{Resolvers: Resolvers{Servers: threeServers}, Dial: pipeDialer(slow)}
		start := time.Now()
		got := f.Answer(t.Context(), newQuery("example.com.", 0), "udp")
		if took := time.Since(start); rcodeOf(got) != miekg.RcodeSuccess || took != 4900*time.Millisecond {
			t.Errorf("%x after %v", got, took)
		}
	})
}

// Who has failed or declined is waited for no longer.
func TestAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		serve := pipeDialer(func(server netip.AddrPort, conn net.Conn) {
			buf := make([]byte, 512)
			n, _ := conn.Read(buf)
			time.Sleep(100 * time.Millisecond)
			code := miekg.RcodeSuccess
			if server == threeServers[0] {
				code = miekg.RcodeServerFailure
			}
			conn.Write(answerTo(buf[:n], code, 0))
		})
		f := &Forwarder{Resolvers: Resolvers{Servers: threeServers}}
		f.Dial = func(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
			if server == threeServers[1] {
				return nil, errors.New("refused")
			}
			return serve(ctx, network, server)
		}
		start := time.Now()
		got := f.Answer(t.Context(), newQuery("example.com.", 0), "udp")
		if took := time.Since(start); rcodeOf(got) != miekg.RcodeSuccess || took != 200*time.Millisecond {
			t.Errorf("%x after %v", got, took)
		}
	})
}

// serveTCP serves one end of a TCP connection and gives the other one; done is
// closed when ServeTCP has returned.
func serveTCP(t *testing.T, ctx context.Context, f *Forwarder) (client *net.TCPConn, done chan struct{}) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	done = make(chan struct{})
	go func() {
		f.ServeTCP(ctx, server)
		server.Close()
		close(done)
	}()
	t.Cleanup(func() { conn.Close(); <-done })
	return conn.(*net.TCPConn), done
}

// A client may send many queries at once, gets each answer when it is there, and
// gets them all after it has ended its half of the connection.
func TestPipelining(t *testing.T) {
	release := make(chan struct{})
	r := startResolver(t, "127.0.0.1", func(_ string, query []byte) [][]byte {
		if q, _ := parseQuery(query); q.question.Name == "slow.example." {
			<-release
		}
		return [][]byte{answerTo(query, miekg.RcodeSuccess, 0)}
	})
	client, done := serveTCP(t, t.Context(), forwarderTo(r.addr))
	writeMessage(client, newQuery("slow.example.", 0))
	for i := range 2 * maxPipelined {
		query := newQuery("fast.example.", 0)
		setID(query, uint16(i))
		writeMessage(client, query)
	}
	client.CloseWrite()
	got := map[uint16]int{}
	for range 2 * maxPipelined {
		answer, err := readMessage(client)
		if err != nil {
			t.Fatal(err)
		}
		got[idOf(answer)]++
	}
	if len(got) != 2*maxPipelined || got[0x1234] != 0 {
		t.Errorf("before the slow one: %v", got)
	}
	close(release)
	if answer, err := readMessage(client); err != nil || idOf(answer) != 0x1234 || rcodeOf(answer) != 0 {
		t.Errorf("the slow one: %x, %v", answer, err)
	}
	if _, err := readMessage(client); err != io.EOF {
		t.Errorf("after all: %v", err)
	}
	<-done
}

// A client that has gone away, and a pod that has, end what is under way.
func TestTCPEnds(t *testing.T) {
	for _, test := range []struct {
		name    string
		timeout time.Duration
		end     func(client *net.TCPConn, cancel func())
		want    error // what the query under way has ended with
	}{
		{"reset", 0, func(client *net.TCPConn, _ func()) { client.SetLinger(0); client.Close() }, context.Canceled},
		{"pod gone", 0, func(_ *net.TCPConn, cancel func()) { cancel() }, context.Canceled},
		{"no DNS", 100 * time.Millisecond, func(client *net.TCPConn, _ func()) { client.Write(make([]byte, 2)) }, context.DeadlineExceeded},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		asked, ended := make(chan struct{}), make(chan error, 1)
		f := forwarderTo(threeServers[0])
		f.Resolvers.Timeout = test.timeout
		f.Dial = func(ctx context.Context, _ string, _ netip.AddrPort) (net.Conn, error) {
			close(asked)
			<-ctx.Done()
			ended <- ctx.Err()
			return nil, ctx.Err()
		}
		client, done := serveTCP(t, ctx, f)
		writeMessage(client, newQuery("example.com.", 0))
		<-asked
		test.end(client, cancel)
		select {
		case <-done:
			if err := <-ended; err != test.want {
				t.Errorf("%s: the query has ended with %v", test.name, err)
			}
		case <-time.After(30 * time.Second):
			t.Errorf("%s: still served", test.name)
		}
		cancel()
	}
}

// pipedTCP serves a pipe in a bubble of time, and tells how long it was served.
func pipedTCP(f *Forwarder, use func(client net.Conn)) time.Duration {
	client, server := net.Pipe()
	var work sync.WaitGroup
	work.Go(func() { use(client) })
	start := time.Now()
	f.ServeTCP(context.Background(), server)
	took := time.Since(start)
	server.Close()
	work.Wait()
	return took
}

func mute(_ netip.AddrPort, conn net.Conn) { io.Copy(io.Discard, conn) }

// Five seconds are what a client has for a query, however it sends it, and a
// client that does not read has as much.
func TestTCPTimeouts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &Forwarder{Resolvers: Resolvers{Servers: threeServers[:1]}, Dial: pipeDialer(func(_ netip.AddrPort, conn net.Conn) {
			if query, err := readMessage(conn); err == nil {
				writeMessage(conn, answerTo(query, miekg.RcodeSuccess, 0))
			}
		})}
		query := append([]byte{0, 29}, newQuery("example.com.", 0)...)
		for _, test := range []struct {
			name string
			use  func(client net.Conn)
			want time.Duration
		}{
			{"sends no DNS", func(client net.Conn) { client.Write(append([]byte{0, 11}, make([]byte, 11)...)) }, 0},
			{"sends nothing", func(client net.Conn) { io.Copy(io.Discard, client) }, 5 * time.Second},
			{"drips", func(client net.Conn) {
				for _, b := range query {
					if _, err := client.Write([]byte{b}); err != nil {
						return
					}
					time.Sleep(time.Second)
				}
			}, 5 * time.Second},
			{"asks again after four seconds", func(client net.Conn) {
				for range 3 {
					client.Write(query)
					if answer, err := readMessage(client); err != nil || rcodeOf(answer) != 0 {
						t.Errorf("%x, %v", answer, err)
					}
					time.Sleep(4 * time.Second)
				}
				io.Copy(io.Discard, client)
			}, 13 * time.Second},
			{"does not read", func(client net.Conn) { client.Write(query) }, 5 * time.Second},
		} {
			if took := pipedTCP(f, test.use); took != test.want {
				t.Errorf("%s: served for %v, want %v", test.name, took, test.want)
			}
		}
	})
}

// What a connection may have under way is bounded, and what comes later waits.
func TestPipeliningBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dialled atomic.Int64
		f := &Forwarder{Resolvers: Resolvers{Servers: threeServers[:1], Attempts: 1}, Dial: pipeDialer(func(a netip.AddrPort, conn net.Conn) {
			dialled.Add(1)
			mute(a, conn)
		})}
		pipedTCP(f, func(client net.Conn) {
			go func() {
				for range 2 * maxPipelined {
					writeMessage(client, newQuery("example.com.", 0))
				}
			}()
			time.Sleep(time.Second)
			if n := dialled.Load(); n != maxPipelined {
				t.Errorf("%d queries under way", n)
			}
			for range 2 * maxPipelined {
				if answer, err := readMessage(client); err != nil || rcodeOf(answer) != miekg.RcodeServerFailure {
					t.Errorf("%x, %v", answer, err)
				}
			}
			client.Close()
		})
	})
}
