package dns

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"ambient-emulator/internal/testmain"
	"ambient-emulator/ztunnel-emulator/internal/accesslog"
)

func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) { testmain.Run(m) }

// behaviour is what a resolver sends back for a query; nothing is silence. Over
// TCP nil also closes the connection.
type behaviour func(network string, query []byte) [][]byte

// resolver is one that misbehaves as told, on loopback.
type resolver struct {
	addr netip.AddrPort
	does behaviour

	udp  net.PacketConn
	tcp  net.Listener
	work sync.WaitGroup

	mu    sync.Mutex
	asked [][]byte
	conns []net.Conn
}

func startResolver(t testing.TB, host string, does behaviour) *resolver {
	t.Helper()
	tcp, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	udp, err := net.ListenPacket("udp", tcp.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	r := &resolver{addr: netip.MustParseAddrPort(tcp.Addr().String()), does: does, udp: udp, tcp: tcp}
	r.work.Add(2)
	go r.serveUDP()
	go r.acceptTCP()
	t.Cleanup(r.stop)
	return r
}

func (r *resolver) stop() {
	r.udp.Close()
	r.tcp.Close()
	r.mu.Lock()
	for _, c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.work.Wait()
}

func (r *resolver) note(query []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked = append(r.asked, query)
}

func (r *resolver) queries() [][]byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([][]byte(nil), r.asked...)
}

func (r *resolver) serveUDP() {
	defer r.work.Done()
	buf := make([]byte, 65535)
	for {
		n, from, err := r.udp.ReadFrom(buf)
		if err != nil {
			return
		}
		query := append([]byte(nil), buf[:n]...)
		r.note(query)
		for _, answer := range r.does("udp", query) {
			r.udp.WriteTo(answer, from)
		}
	}
}

func (r *resolver) acceptTCP() {
	defer r.work.Done()
	for {
		conn, err := r.tcp.Accept()
		if err != nil {
			return
		}
		r.mu.Lock()
		r.conns = append(r.conns, conn)
		r.mu.Unlock()
		r.work.Add(1)
		go r.serveTCP(conn)
	}
}

func (r *resolver) serveTCP(conn net.Conn) {
	defer r.work.Done()
	defer conn.Close()
	for {
		query, err := readMessage(conn)
		if err != nil {
			return
		}
		r.note(query)
		answers := r.does("tcp", query)
		if answers == nil {
			return
		}
		for _, answer := range answers {
			writeMessage(conn, answer)
		}
	}
}

// answerTo is an answer with one address, and a pad to the size if that is more.
func answerTo(query []byte, rcode, size int) []byte {
	var q, a miekg.Msg
	if err := q.Unpack(query); err != nil {
		panic(err)
	}
	a.SetRcode(&q, rcode)
	if rcode == miekg.RcodeSuccess && len(q.Question) == 1 {
		a.Answer = []miekg.RR{&miekg.A{Hdr: miekg.RR_Header{Name: q.Question[0].Name, Rrtype: miekg.TypeA, Class: miekg.ClassINET, Ttl: 7}, A: net.IPv4(192, 0, 2, 1)}}
	}
	for pad := size - a.Len(); pad > 0; pad = size - a.Len() {
		a.Extra = append(a.Extra, &miekg.TXT{Hdr: miekg.RR_Header{Name: ".", Rrtype: miekg.TypeTXT, Class: miekg.ClassINET}, Txt: []string{strings.Repeat("x", min(255, max(0, pad-12)))}})
	}
	b, err := a.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func says(rcode int) behaviour {
	return func(_ string, query []byte) [][]byte { return [][]byte{answerTo(query, rcode, 0)} }
}

func silent(string, []byte) [][]byte { return [][]byte{} }

func hangsUp(string, []byte) [][]byte { return nil }

// newQuery is one for an address, as miekg's client would send it.
func newQuery(name string, edns uint16) []byte {
	m := new(miekg.Msg).SetQuestion(name, miekg.TypeA)
	m.Id = 0x1234
	if edns > 0 {
		m.SetEdns0(edns, true)
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

func forwarderTo(servers ...netip.AddrPort) *Forwarder {
	return &Forwarder{
		Resolvers: Resolvers{Servers: servers},
		Dial: func(ctx context.Context, network string, server netip.AddrPort) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, server.String())
		},
	}
}

// nobody is an address where nobody listens.
func nobody(t *testing.T) netip.AddrPort {
	r := startResolver(t, "127.0.0.1", silent)
	r.stop()
	return r.addr
}

// What goes up is what the client has sent, and what comes down is what the
// resolver has sent, but for the id.
func TestAsAsked(t *testing.T) {
	odd := unhex(`1234 0130 0001 0000 0000 0001  03 57 77 77 07 65 58 61 4d 50 6c 65 00 ff01 0001
		00 0029 04d0 00 00 8000 0013  ffee 0003 61 62 63  000a 0008 0102030405060708`)
	answer := unhex(`0000 85b0 0001 0001 0000 0000  03 57 77 77 07 65 58 61 4d 50 6c 65 00 ff01 0001
		c00c ff01 0001 00000007 0003 c0 0c 2a`)
	for _, host := range []string{"127.0.0.1", "::1"} {
		for _, network := range []string{"udp", "tcp"} {
			r := startResolver(t, host, func(_ string, query []byte) [][]byte {
				a := append([]byte(nil), answer...)
				copy(a, query[:2])
				return [][]byte{a}
			})
			got := forwarderTo(r.addr).Answer(t.Context(), odd, network)
			if want := append([]byte{0x12, 0x34}, answer[2:]...); string(got) != string(want) {
				t.Errorf("%s over %s: answer\n%x, want\n%x", host, network, got, want)
			}
			asked := r.queries()
			if len(asked) != 1 || string(asked[0][2:]) != string(odd[2:]) {
				t.Errorf("%s over %s: asked\n%x, want, but for the id,\n%x", host, network, asked, odd)
			}
		}
	}
}

// The id that a resolver sees is not the client's.
func TestFreshID(t *testing.T) {
	r := startResolver(t, "127.0.0.1", says(miekg.RcodeSuccess))
	f := forwarderTo(r.addr)
	for range 8 {
		f.Answer(t.Context(), newQuery("example.com.", 0), "udp")
	}
	ids := map[uint16]bool{}
	for _, q := range r.queries() {
		ids[idOf(q)] = true
	}
	if len(ids) < 6 {
		t.Errorf("8 queries had the ids %v", ids)
	}
}

// What is no answer to the question is not there.
func TestForged(t *testing.T) {
	for _, network := range []string{"udp", "tcp"} {
		r := startResolver(t, "127.0.0.1", func(_ string, query []byte) [][]byte {
			good := answerTo(query, miekg.RcodeSuccess, 0)
			forged := func(change func(b []byte)) []byte {
				b := append([]byte(nil), good...)
				b[len(b)-1] = 66 // the address
				change(b)
				return b
			}
			return [][]byte{
				forged(func(b []byte) { b[1]++ }),            // id
				forged(func(b []byte) { b[2] &^= flagQR }),   // a query
				forged(func(b []byte) { b[2] |= 4 << 3 }),    // a NOTIFY
				forged(func(b []byte) { b[13] = 'f' }),       // name
				forged(func(b []byte) { b[26] = 28 }),        // type
				forged(func(b []byte) { b[28] = 3 }),         // class
				forged(func(b []byte) { b[5] = 2 }),          // two questions
				forged(func(b []byte) { b[5] = 0 }),          // none
				forged(func(b []byte) { b[12] = 0xc0 }),      // a pointer
				forged(func(b []byte) { b[12] = 0x40 }),      // reserved
				good[:14], good[:11], good[:3], {}, good[:0], // cut off
				good,
			}
		})
		f := forwarderTo(r.addr)
		f.Resolvers.Attempts = 1
		got := f.Answer(t.Context(), newQuery("example.com.", 0), network)
		if len(got) < 12 || got[3]&rcode != 0 || got[len(got)-1] != 1 {
			t.Errorf("over %s: %x", network, got)
		}
	}
}

// A resolver may change the case of a name, and need not repeat a question that
// it could not read.
func TestTolerated(t *testing.T) {
	upper := startResolver(t, "127.0.0.1", func(_ string, query []byte) [][]byte {
		b := answerTo(query, miekg.RcodeSuccess, 0)
		copy(b[13:], "EXAMPLE")
		return [][]byte{b}
	})
	if got := forwarderTo(upper.addr).Answer(t.Context(), newQuery("example.com.", 0), "udp"); string(got[13:20]) != "EXAMPLE" {
		t.Errorf("case: %x", got)
	}
	header := startResolver(t, "127.0.0.1", func(_ string, query []byte) [][]byte {
		return [][]byte{append(append([]byte(nil), query[:2]...), unhex("8001 0000 0000 0000 0000")...)}
	})
	if got := forwarderTo(header.addr).Answer(t.Context(), newQuery("example.com.", 0), "udp"); string(got) != string(unhex("1234 8001 0000 0000 0000 0000")) {
		t.Errorf("no question: %x", got)
	}
}

// What the second resolver knows does not depend on what is wrong with the first.
func TestNextServer(t *testing.T) {
	for name, does := range map[string]behaviour{
		"silent": silent, "hangs up": hangsUp, "servfail": says(miekg.RcodeServerFailure),
		"refused": says(miekg.RcodeRefused), "notimp": says(miekg.RcodeNotImplemented), "gone": nil,
	} {
		for _, network := range []string{"udp", "tcp"} {
			first := nobody(t)
			if does != nil {
				first = startResolver(t, "127.0.0.1", does).addr
			}
			second := startResolver(t, "127.0.0.1", says(miekg.RcodeNameError))
			f := forwarderTo(first, second.addr)
			if name == "silent" || name == "hangs up" { // over UDP that is the same
				f.Resolvers.Timeout = 100 * time.Millisecond
			}
			got := f.Answer(t.Context(), newQuery("example.com.", 0), network)
			if rcodeOf(got) != miekg.RcodeNameError || len(second.queries()) != 1 {
				t.Errorf("%s over %s: %x, the second was asked %d times", name, network, got, len(second.queries()))
			}
		}
	}
}

// A good answer of the first asks nobody else, whatever it says about the name.
func TestFirstServer(t *testing.T) {
	for _, rcode := range []int{miekg.RcodeSuccess, miekg.RcodeNameError, miekg.RcodeFormatError} {
		first, second := startResolver(t, "127.0.0.1", says(rcode)), startResolver(t, "127.0.0.1", says(miekg.RcodeSuccess))
		got := forwarderTo(first.addr, second.addr).Answer(t.Context(), newQuery("example.com.", 0), "udp")
		if rcodeOf(got) != rcode || len(second.queries()) != 0 {
			t.Errorf("rcode %d: %x, the second was asked %d times", rcode, got, len(second.queries()))
		}
	}
}

// If nobody is of use, the first one that said so is heard, else it is SERVFAIL.
func TestNoServer(t *testing.T) {
	refuses, fails := startResolver(t, "127.0.0.1", says(miekg.RcodeRefused)), startResolver(t, "127.0.0.1", says(miekg.RcodeServerFailure))
	mute, hangs := startResolver(t, "127.0.0.1", silent), startResolver(t, "127.0.0.1", hangsUp)
	gone := nobody(t)
	servfail := rcodeReply(newQuery("example.com.", 1232), miekg.RcodeServerFailure)
	for _, test := range []struct {
		name, network string
		servers       []netip.AddrPort
		rcode         int
		log           string
	}{
		{"all decline", "udp", []netip.AddrPort{refuses.addr, fails.addr}, miekg.RcodeRefused, `server=` + refuses.addr.String()},
		{"one is gone, one declines", "udp", []netip.AddrPort{gone, refuses.addr}, miekg.RcodeRefused, `result="REFUSED"`},
		{"one declines, one is silent", "udp", []netip.AddrPort{refuses.addr, mute.addr}, miekg.RcodeRefused, `result="REFUSED"`},
		{"gone", "udp", []netip.AddrPort{gone}, miekg.RcodeServerFailure, "connection refused"},
		{"gone", "tcp", []netip.AddrPort{gone}, miekg.RcodeServerFailure, "connection refused"},
		{"hangs up", "tcp", []netip.AddrPort{hangs.addr}, miekg.RcodeServerFailure, "the resolver has closed the connection"},
		{"silent", "udp", []netip.AddrPort{mute.addr}, miekg.RcodeServerFailure, "no answer within 200ms"},
		{"silent", "tcp", []netip.AddrPort{mute.addr}, miekg.RcodeServerFailure, "no answer within 200ms"},
		{"none", "udp", nil, miekg.RcodeServerFailure, "no resolver to ask"},
	} {
		var log strings.Builder
		f := forwarderTo(test.servers...)
		f.Resolvers.Timeout = 100 * time.Millisecond
		f.Log = accesslog.New(&log, accesslog.Options{Level: slog.LevelDebug})
		got := f.Answer(t.Context(), newQuery("example.com.", 1232), test.network)
		if rcodeOf(got) != test.rcode || idOf(got) != 0x1234 {
			t.Errorf("%s over %s: %x", test.name, test.network, got)
		}
		if test.rcode == miekg.RcodeServerFailure && string(got) != string(servfail) {
			t.Errorf("%s over %s: %x, want %x", test.name, test.network, got, servfail)
		}
		line := log.String()
		if !strings.Contains(line, "\tdebug\tdns\tdns query\tprotocol=\""+test.network+`" query="A" domain="example.com." result="`) || !strings.Contains(line, test.log) {
			t.Errorf("%s over %s: logged %s", test.name, test.network, line)
		}
	}
}

// A query that was lost is sent again.
func TestLost(t *testing.T) {
	lost := false
	r := startResolver(t, "127.0.0.1", func(_ string, query []byte) [][]byte {
		if !lost {
			lost = true
			return nil
		}
		return [][]byte{answerTo(query, miekg.RcodeSuccess, 0)}
	})
	f := forwarderTo(r.addr)
	f.Resolvers.Timeout = 100 * time.Millisecond
	got := f.Answer(t.Context(), newQuery("example.com.", 0), "udp")
	if asked := r.queries(); rcodeOf(got) != 0 || len(asked) != 2 || string(asked[0]) != string(asked[1]) {
		t.Errorf("%x after %x", got, asked)
	}
}

// Over UDP a client gets what it takes and no more; a truncated answer of the
// resolver is the client's to judge.
func TestTruncation(t *testing.T) {
	for _, test := range []struct {
		network string
		edns    uint16
		size    int
		want    int // bytes
		tc      bool
	}{
		{"udp", 0, 512, 512, false},
		{"udp", 0, 513, 29, true},
		{"udp", 0, 9000, 29, true},
		{"udp", 100, 512, 512, false}, // a smaller size means 512 (RFC 6891, 6.2.3)
		{"udp", 1232, 1232, 1232, false},
		{"udp", 1232, 1233, 40, true},
		{"udp", 65535, 60000, 60000, false},
		{"tcp", 0, 60000, 60000, false},
	} {
		r := startResolver(t, "127.0.0.1", func(_ string, query []byte) [][]byte {
			return [][]byte{answerTo(query, miekg.RcodeSuccess, test.size)}
		})
		got := forwarderTo(r.addr).Answer(t.Context(), newQuery("example.com.", test.edns), test.network)
		if len(got) != test.want || got[2]&flagTC != 0 != test.tc {
			t.Errorf("%+v: %d bytes, flags %x", test, len(got), got[2:4])
		}
		var m miekg.Msg
		if err := m.Unpack(got); err != nil {
			t.Errorf("%+v: %v", test, err)
		}
		if test.tc && (len(m.Question) != 1 || m.Answer != nil || (m.IsEdns0() != nil) != (test.edns > 0)) {
			t.Errorf("%+v: %v", test, &m)
		}
	}
	r := startResolver(t, "127.0.0.1", func(_ string, query []byte) [][]byte {
		b := answerTo(query, miekg.RcodeSuccess, 0)
		b[2] |= flagTC
		return [][]byte{b}
	})
	query := newQuery("example.com.", 0)
	if got, want := forwarderTo(r.addr).Answer(t.Context(), query, "udp"), answerTo(query, miekg.RcodeSuccess, 0); got[2]&flagTC == 0 || string(got[4:]) != string(want[4:]) {
		t.Errorf("truncated above: %x", got)
	}
}

// Past the limit it is SERVFAIL at once, and one line says so.
func TestLimit(t *testing.T) {
	asked, release := make(chan struct{}), make(chan struct{})
	var log strings.Builder
	f := forwarderTo(netip.MustParseAddrPort("127.0.0.1:53"))
	f.Limit = 2
	f.Log = accesslog.New(&log, accesslog.Options{})
	f.Dial = func(context.Context, string, netip.AddrPort) (net.Conn, error) {
		asked <- struct{}{}
		<-release
		return nil, errors.New("released")
	}
	var answering sync.WaitGroup
	for range 2 {
		answering.Go(func() { f.Answer(t.Context(), newQuery("example.com.", 0), "udp") })
		<-asked
	}
	for range 10 {
		if got := f.Answer(t.Context(), newQuery("example.com.", 0), "udp"); rcodeOf(got) != miekg.RcodeServerFailure {
			t.Errorf("%x", got)
		}
	}
	if got := f.Answer(t.Context(), rcodeReply(newQuery("example.com.", 0), 0), "udp"); rcodeOf(got) != miekg.RcodeFormatError {
		t.Errorf("what is not forwarded needs no place: %x", got)
	}
	close(release)
	answering.Wait()
	if s := log.String(); strings.Count(s, "\n") != 1 || !strings.Contains(s, "\twarn\tdns\ttoo many DNS queries at once") {
		t.Errorf("logged %q", s)
	}
	answering.Go(func() { f.Answer(t.Context(), newQuery("example.com.", 0), "udp") })
	<-asked // there is room again
	answering.Wait()
}

// A whole session: a client over both networks, and a server that knows a zone.
func TestSession(t *testing.T) {
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	zone := miekg.HandlerFunc(func(w miekg.ResponseWriter, q *miekg.Msg) {
		a := new(miekg.Msg).SetReply(q)
		for i := range 100 {
			rr := &miekg.A{Hdr: miekg.RR_Header{Name: q.Question[0].Name, Rrtype: miekg.TypeA, Class: miekg.ClassINET}, A: net.IPv4(192, 0, 2, byte(i))}
			a.Answer = append(a.Answer, rr)
		}
		if w.RemoteAddr().Network() == "udp" {
			a.Truncate(512)
		}
		w.WriteMsg(a)
	})
	var work sync.WaitGroup
	defer work.Wait()
	for _, server := range []*miekg.Server{{PacketConn: udp, Handler: zone}, {Listener: tcp, Handler: zone}} {
		ready := make(chan struct{})
		server.NotifyStartedFunc = func() { close(ready) }
		work.Go(func() { server.ActivateAndServe() })
		<-ready
		defer server.Shutdown()
	}

	f := forwarderTo(netip.MustParseAddrPort(udp.LocalAddr().String()))
	front := startResolver(t, "127.0.0.1", func(network string, query []byte) [][]byte {
		return [][]byte{f.Answer(t.Context(), query, network)}
	})
	for _, test := range []struct {
		network string
		tc      bool
	}{{"udp", true}, {"tcp", false}} {
		client := miekg.Client{Net: test.network}
		a, _, err := client.Exchange(new(miekg.Msg).SetQuestion("many.example.", miekg.TypeA), front.addr.String())
		if err != nil {
			t.Fatal(err)
		}
		if a.Truncated != test.tc || !test.tc && len(a.Answer) != 100 || a.Rcode != 0 {
			t.Errorf("over %s: %v", test.network, a)
		}
	}
}

func BenchmarkAnswer(b *testing.B) {
	r := startResolver(b, "127.0.0.1", func(_ string, query []byte) [][]byte {
		query[2] |= flagQR
		return [][]byte{query}
	})
	f := forwarderTo(r.addr)
	query := newQuery("example.com.", 1232)
	for _, network := range []string{"udp", "tcp"} {
		b.Run(network, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if rcodeOf(f.Answer(b.Context(), query, network)) != 0 {
					b.Fatal("no answer")
				}
			}
		})
	}
}

// pipeDialer gives the other ends of its connections to a resolver of the test.
func pipeDialer(serve func(server netip.AddrPort, conn net.Conn)) func(context.Context, string, netip.AddrPort) (net.Conn, error) {
	return func(_ context.Context, _ string, server netip.AddrPort) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go serve(server, theirs)
		return ours, nil
	}
}
