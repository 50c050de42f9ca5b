package redirect

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// part is a piece of a rule, a match or a statement: its words in nft syntax, and
// the expressions that nft compiles those words to. A test holds one against the
// other with the real nft.
type part struct {
	words string
	// What nft puts in front of it, unless it is known already: which family
	// (NFPROTO_*) or transport (IPPROTO_*) the packet must have for the payload
	// to be where it is looked for.
	family, transport byte
	exprs             []expr.Any
}

// reg is where each expression leaves its result for the next one.
const reg = unix.NFT_REG_1

// rule is one line of a chain.
type rule struct {
	id    string // the rule's number in the sheet, "/6" for the IPv6 twin
	why   string
	match []part
	then  []part
}

// line makes the rule's words; counter stands between matches and statements.
func (r rule) line(counter string) string {
	var s string
	for _, p := range r.match {
		s += p.words + " "
	}
	s += counter
	for _, p := range r.then {
		s += " " + p.words
	}
	return s
}

// compile makes the rule's expressions.
func (r rule) compile() []expr.Any {
	var out []expr.Any
	var family, transport byte
	add := func(parts []part) {
		for _, p := range parts {
			if p.family != 0 && p.family != family {
				family = p.family
				out = append(out, &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg}, equal([]byte{family}))
			}
			if p.transport != 0 && p.transport != transport {
				transport = p.transport
				out = append(out, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}, equal([]byte{transport}))
			}
			out = append(out, p.exprs...)
		}
	}
	add(r.match)
	out = append(out, &expr.Counter{})
	add(r.then)
	return out
}

func equal(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: data} }

func differ(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: data} }

func host32(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

func port(p uint16) []byte { return binaryutil.BigEndian.PutUint16(p) }

// The matches.

func tcp() part { return part{words: "meta l4proto tcp", transport: unix.IPPROTO_TCP} }

func dport(transport byte, p uint16) part { return portAt(transport, "dport", 2, p) }

func sport(transport byte, p uint16) part { return portAt(transport, "sport", 0, p) }

func portAt(transport byte, name string, offset uint32, p uint16) part {
	proto := "tcp"
	if transport == unix.IPPROTO_UDP {
		proto = "udp"
	}
	return part{
		words: fmt.Sprintf("%s %s %d", proto, name, p), transport: transport,
		exprs: []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2}, equal(port(p))},
	}
}

func notTCPDport(p uint16) part {
	q := dport(unix.IPPROTO_TCP, p)
	q.words = fmt.Sprintf("tcp dport != %d", p)
	q.exprs[1] = differ(port(p))
	return q
}

func (f family) only() part { return part{words: "meta nfproto " + f.name, family: f.nfproto} }

func (f family) from(a netip.Addr) part {
	return part{words: f.ip + " saddr " + a.String(), family: f.nfproto, exprs: []expr.Any{f.load(f.source), equal(a.AsSlice())}}
}

func (f family) to(a netip.Addr) part {
	return part{words: f.ip + " daddr " + a.String(), family: f.nfproto, exprs: []expr.Any{f.load(f.dest), equal(a.AsSlice())}}
}

func (f family) notTo(a netip.Addr) part {
	return part{words: f.ip + " daddr != " + a.String(), family: f.nfproto, exprs: []expr.Any{f.load(f.dest), differ(a.AsSlice())}}
}

func (f family) load(offset uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(f.loopback.BitLen() / 8)}
}

// masked compares the low bits of a mark that is in the register already.
func masked(load expr.Any, compare expr.Any) []expr.Any {
	return []expr.Any{load, &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: host32(MarkMask), Xor: host32(0)}, compare}
}

func mark(v uint32) part {
	return part{words: fmt.Sprintf("meta mark & %#x == %#x", MarkMask, v), exprs: masked(loadMark(), equal(host32(v)))}
}

func notMark(v uint32) part {
	return part{words: fmt.Sprintf("meta mark & %#x != %#x", MarkMask, v), exprs: masked(loadMark(), differ(host32(v)))}
}

func ctMark(v uint32) part {
	return part{words: fmt.Sprintf("ct mark & %#x == %#x", MarkMask, v), exprs: masked(loadCtMark(), equal(host32(v)))}
}

// socketMark looks at the mark of the socket that will get the packet.
func socketMark(v uint32) part {
	return part{words: fmt.Sprintf("socket mark & %#x == %#x", MarkMask, v), exprs: masked(&expr.Socket{Key: expr.SocketKeyMark, Register: reg}, equal(host32(v)))}
}

func established() part {
	bits := host32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
	return part{words: "ct state established,related", exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: reg},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: bits, Xor: host32(0)},
		differ(host32(0)),
	}}
}

func iif(name string) part {
	return part{words: fmt.Sprintf("iifname %q", name), exprs: []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg}, equal(ifname(name))}}
}

func oif(name string) part {
	return part{words: fmt.Sprintf("oifname %q", name), exprs: []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg}, equal(ifname(name))}}
}

func notOif(name string) part {
	return part{words: fmt.Sprintf("oifname != %q", name), exprs: []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg}, differ(ifname(name))}}
}

func ifname(name string) []byte {
	return append([]byte(name), make([]byte, unix.IFNAMSIZ-len(name))...)
}

func loadMark() expr.Any { return &expr.Meta{Key: expr.MetaKeyMARK, Register: reg} }

func loadCtMark() expr.Any { return &expr.Ct{Key: expr.CtKeyMARK, Register: reg} }
