package dns

import (
	"context"
	"encoding/hex"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	miekg "github.com/miekg/dns"
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		panic(err)
	}
	return b
}

// rcodeReply is the reply of our own to a query.
func rcodeReply(msg []byte, rcode int) []byte {
	q, _ := parseQuery(msg)
	return q.reply(rcode)
}

const (
	www   = " 03 777777 07 6578616d706c65 00 " // www.example
	opt   = " 00 0029 1000 00 00 8000 0000 "   // 4096 bytes, DNSSEC OK
	ours  = " 00 0029 04d0 00 00 8000 0000 "
	count = " 0001 0000 0000 0000 "
)

// What can't be forwarded is answered here, and by these bytes.
func TestBadQueries(t *testing.T) {
	for _, test := range []struct{ name, query, want string }{
		{"nothing", ``, ``},
		{"less than a header", `1234 0100 0001 0000 0000 00`, ``},
		{"a response: FORMERR", `1234 8180` + count + www + `0001 0001`, `1234 8181` + count + www + `0001 0001`},
		{"a response to an update: FORMERR", `1234 a800` + count + www + `0006 0001`, `1234 a881` + count + www + `0006 0001`},
		{"a status query: NOTIMP", `1234 1000` + count + www + `0001 0001`, `1234 9084` + count + www + `0001 0001`},
		{"a notify: NOTIMP", `1234 2400` + count + www + `0006 0001`, `1234 a084` + count + www + `0006 0001`},
		{"an update: NOTIMP", `1234 2800 0001 0000 0001 0000` + www + `0006 0001 c00c 00ff 00ff 00000000 0000`, `1234 a884` + count + www + `0006 0001`},
		{"an inverse query: NOTIMP", `1234 0900 0000 0001 0000 0000 00 0001 0001 00000000 0004 7f000001`, `1234 8984 0000 0000 0000 0000`},
		{"opcode 15, CD, EDNS: NOTIMP", `1234 7910 0001 0000 0000 0001` + www + `0001 0001` + opt, `1234 f994 0001 0000 0000 0001` + www + `0001 0001` + ours},
		{"two questions: FORMERR", `1234 0100 0002 0000 0000 0000` + www + `0001 0001` + www + `001c 0001`, `1234 8181 0000 0000 0000 0000`},
		{"a question that is not there: FORMERR", `1234 0100` + count, `1234 8181 0000 0000 0000 0000`},
		{"a name cut off: FORMERR", `1234 0100` + count + `03 7777`, `1234 8181 0000 0000 0000 0000`},
		{"a name with no end: FORMERR", `1234 0100` + count + `03 777777`, `1234 8181 0000 0000 0000 0000`},
		{"no type: FORMERR", `1234 0100` + count + www, `1234 8181 0000 0000 0000 0000`},
		{"no class: FORMERR", `1234 0100` + count + www + `0001 00`, `1234 8181 0000 0000 0000 0000`},
		{"a pointer: FORMERR", `1234 0100` + count + `c00c 0001 0001`, `1234 8181 0000 0000 0000 0000`},
		{"a reserved label: FORMERR", `1234 0100` + count + `41 00 0001 0001 00`, `1234 8181 0000 0000 0000 0000`},
		{"a name of 256 bytes: FORMERR", `1234 0100` + count + strings.Repeat(`01 61`, 127) + `01 00 0001 0001`, `1234 8181 0000 0000 0000 0000`},
	} {
		for _, network := range []string{"udp", "tcp"} {
			f := &Forwarder{} // whoever asks somebody panics
			got := f.Answer(t.Context(), unhex(test.query), network)
			if want := unhex(test.want); string(got) != string(want) || got == nil != (len(want) == 0) {
				t.Errorf("%s, over %s:\n%x, want\n%x", test.name, network, got, want)
			}
		}
	}
}

// One datagram with the address of another pod's proxy must not make the two
// answer each other for ever.
func TestNoEndlessAnswers(t *testing.T) {
	one, other := &Forwarder{}, &Forwarder{}
	for _, first := range []string{`1234 8180` + count + www + `0001 0001`, `1234 8181 0000 0000 0000 0000`, `1234 2800 0000 0000 0000 0000`} {
		msg := unhex(first)
		for messages := 0; msg != nil; messages++ {
			if messages == 3 {
				t.Errorf("%s: they still answer each other: %x", first, msg)
				break
			}
			msg = one.Answer(t.Context(), msg, "udp")
			one, other = other, one
		}
	}
	// Over TCP there is a client that waits.
	if got := one.Answer(t.Context(), unhex(`1234 8181 0000 0000 0000 0000`), "tcp"); len(got) != headerSize {
		t.Errorf("over TCP the answer is %x", got)
	}
}

// These are odd, and are forwarded as they are.
func TestOddQueries(t *testing.T) {
	for _, test := range []struct {
		name, query, question string
		size                  int
	}{
		{"plain", `1234 0100` + count + www + `0001 0001`, ";www.example.\tIN\t A", 512},
		{"EDNS", `1234 0100 0001 0000 0000 0001` + www + `0001 0001` + opt, ";www.example.\tIN\t A", 4096},
		{"EDNS before a TSIG", `1234 0100 0001 0000 0000 0002` + www + `0001 0001` + opt + `c00c 00fa 00ff 00000000 0001 61`, ";www.example.\tIN\t A", 4096},
		{"EDNS after another record", `1234 0100 0001 0000 0000 0002` + www + `0001 0001 c00c 0010 0001 00000000 0001 00` + opt, ";www.example.\tIN\t A", 4096},
		{"EDNS in a wrong section", `1234 0100 0001 0001 0000 0000` + www + `0001 0001` + opt, ";www.example.\tIN\t A", 512},
		{"EDNS with a name", `1234 0100 0001 0000 0000 0001` + www + `0001 0001` + `c00c 0029 1000 00 00 8000 0000`, ";www.example.\tIN\t A", 512},
		{"EDNS cut off", `1234 0100 0001 0000 0000 0001` + www + `0001 0001 00 0029 1000 00 00 8000`, ";www.example.\tIN\t A", 512},
		{"EDNS with less data than it says", `1234 0100 0001 0000 0000 0001` + www + `0001 0001 00 0029 1000 00 00 8000 0001`, ";www.example.\tIN\t A", 512},
		{"records that are not there", `1234 0100 0001 ffff ffff ffff` + www + `0001 0001`, ";www.example.\tIN\t A", 512},
		{"no question", `1234 0100 0000 0000 0000 0001 00 0029 1000 00 00 0000 0000`, ";\tCLASS0\t None", 4096},
		{"the root, any type", `1234 0000` + count + `00 00ff 00ff`, ";.\tCLASS255\t ANY", 512},
		{"an unknown type and a dot in a label", `1234 0000` + count + `03 612e62 00 fffe 0005`, ";a\\.b.\tCLASS5\t TYPE65534", 512},
		{"a byte too many", `1234 0000` + count + www + `0001 0001 00`, ";www.example.\tIN\t A", 512},
	} {
		q, rcode := parseQuery(unhex(test.query))
		if q.size != test.size || q.question.String() != test.question || rcode != 0 {
			t.Errorf("%s: %q, %d bytes, rcode %d", test.name, q.question.String(), q.size, rcode)
		}
	}
}

func TestRcodeName(t *testing.T) {
	for code, want := range map[byte]string{0: "NOERROR", 2: "SERVFAIL", 13: "13"} {
		if got := rcodeName([]byte{0, 0, 0, 0xf0 | code}); got != want {
			t.Errorf("%d is %q", code, got)
		}
	}
}

// oneAnswer is a resolver's UDP socket that gives one message, with the right id.
type oneAnswer struct {
	net.Conn // nil
	answer   []byte
	id       [2]byte
}

func (c *oneAnswer) Close() error                    { return nil }
func (c *oneAnswer) SetReadDeadline(time.Time) error { return nil }

func (c *oneAnswer) Write(b []byte) (int, error) { return copy(c.id[:], b), nil }

func (c *oneAnswer) Read(b []byte) (int, error) {
	if c.answer == nil {
		return 0, io.EOF
	}
	n := copy(b, c.answer)
	copy(b[:n], c.id[:])
	c.answer = nil
	return n, nil
}

func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		``, `1234 0100` + count + www + `0001 0001`, `1234 8180` + count + www + `0001 0001`,
		`1234 0100 0001 0000 0000 0001` + www + `0001 0001` + opt,
		`1234 0100` + count + `c00c 0001 0001`, `1234 0100 0000 0000 0000 0001` + opt,
		`1234 8181` + count + www + `0001 0001`,
	} {
		f.Add(unhex(s), unhex(`0000 8180`+count+www+`0001 0001`))
	}
	f.Fuzz(func(t *testing.T, query, upstream []byte) {
		before := string(query)
		relay := &Forwarder{
			Resolvers: Resolvers{Servers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}},
			Dial: func(context.Context, string, netip.AddrPort) (net.Conn, error) {
				return &oneAnswer{answer: upstream}, nil
			},
		}
		got := relay.Answer(t.Context(), query, "udp")
		if string(query) != before {
			t.Fatalf("the query was changed to %x", query)
		}
		if len(query) < headerSize || complains(query) {
			if got != nil {
				t.Fatalf("an answer: %x", got)
			}
			return
		}
		if len(got) < headerSize || idOf(got) != idOf(query) || got[2]&flagQR == 0 || got[2]&opcode != query[2]&opcode {
			t.Fatalf("no answer to it: %x", got)
		}
		q, code := parseQuery(query)
		if len(got) > q.size {
			t.Fatalf("%d bytes for a client that takes %d", len(got), q.size)
		}
		if code == 0 && !q.isAnswer(got, idOf(query)) {
			t.Fatalf("another question: %x", got)
		}
		if string(got[2:]) != string(upstream[min(2, len(upstream)):]) && code == 0 &&
			got[2]&flagTC == 0 && rcodeOf(got) != miekg.RcodeServerFailure {
			t.Fatalf("neither the resolver's answer nor ours: %x", got)
		}
	})
}
