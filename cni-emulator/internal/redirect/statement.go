package redirect

import (
	"fmt"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The statements: what becomes of a packet that has matched.

func accept() part { return verdict("accept", expr.VerdictAccept) }

func ret() part { return verdict("return", expr.VerdictReturn) }

// reset answers with RST, as a closed port does.
func reset() part {
	return part{words: "reject with tcp reset", exprs: []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}}
}

func verdict(words string, kind expr.VerdictKind) part {
	return part{words: words, exprs: []expr.Any{&expr.Verdict{Kind: kind}}}
}

// redirectTo is REDIRECT: the destination becomes this host itself, at that port.
func redirectTo(p uint16) part {
	const flags = unix.NF_NAT_RANGE_PROTO_SPECIFIED
	return part{words: fmt.Sprintf("redirect to :%d", p), exprs: []expr.Any{
		&expr.Immediate{Register: reg, Data: port(p)},
		&expr.Redir{RegisterProtoMin: reg, RegisterProtoMax: reg, Flags: flags},
	}}
}

// tproxyTo gives the packet to the transparent socket that listens on loopback at
// that port, without writing to it. If there is none the rule ends here, unlike
// the TPROXY of iptables, which drops.
func (f family) tproxyTo(p uint16) part {
	const second = unix.NFT_REG_2
	at := f.loopback.String()
	if f.loopback.Is6() {
		at = "[" + at + "]"
	}
	return part{words: fmt.Sprintf("tproxy %s to %s:%d", f.ip, at, p), family: f.nfproto, exprs: []expr.Any{
		&expr.Immediate{Register: reg, Data: f.loopback.AsSlice()},
		&expr.Immediate{Register: second, Data: port(p)},
		&expr.TProxy{Family: f.nfproto, TableFamily: unix.NFPROTO_INET, RegAddr: reg, RegPort: second},
	}}
}

// setMark and setCtMark write the low bits and leave the rest as it is.
func setMark(v uint32) part {
	return part{words: fmt.Sprintf("meta mark set meta mark & %#x | %#x", ^uint32(MarkMask), v), exprs: []expr.Any{
		loadMark(), lowBits(v), &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg},
	}}
}

func setCtMark(v uint32) part {
	return part{words: fmt.Sprintf("ct mark set ct mark & %#x | %#x", ^uint32(MarkMask), v), exprs: []expr.Any{
		loadCtMark(), lowBits(v), &expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: reg},
	}}
}

func lowBits(v uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: host32(^uint32(MarkMask)), Xor: host32(v)}
}

// restoreMark copies all 32 bits.
func restoreMark() part {
	return part{words: "meta mark set ct mark", exprs: []expr.Any{
		loadCtMark(), &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg},
	}}
}

func setZone(zone uint16) part {
	return part{words: fmt.Sprintf("ct zone set %d", zone), exprs: []expr.Any{
		&expr.Immediate{Register: reg, Data: binaryutil.NativeEndian.PutUint16(zone)},
		&expr.Ct{Key: expr.CtKeyZONE, SourceRegister: true, Register: reg},
	}}
}
