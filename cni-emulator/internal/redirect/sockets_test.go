package redirect

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// diagMessage is what the kernel says of a listener, with the attribute
// INET_DIAG_SOCKOPT if options are given.
func diagMessage(af, state byte, from, to netip.AddrPort, inode uint32, options ...byte) []byte {
	b := make([]byte, 72)
	b[0], b[1] = af, state
	binary.BigEndian.PutUint16(b[4:], from.Port())
	binary.BigEndian.PutUint16(b[6:], to.Port())
	copy(b[8:24], from.Addr().AsSlice())
	copy(b[24:40], to.Addr().AsSlice())
	binary.NativeEndian.PutUint32(b[68:], inode)
	if len(options) > 0 {
		b = binary.NativeEndian.AppendUint16(b, uint16(4+len(options)))
		b = binary.NativeEndian.AppendUint16(b, 22)
		b = append(b, options...)
		b = append(b, make([]byte, (4-len(options)%4)%4)...)
	}
	return b
}

func TestParseDiag(t *testing.T) {
	four, six := netip.MustParseAddrPort("127.0.0.1:15006"), netip.MustParseAddrPort("[fd07::2]:15008")
	none4, none6 := netip.MustParseAddrPort("0.0.0.0:0"), netip.MustParseAddrPort("[::]:0")
	mapped := netip.MustParseAddrPort("[::ffff:10.0.0.1]:80")
	for _, tt := range []struct {
		b    []byte
		want inetSocket
	}{
		{diagMessage(unix.AF_INET, stateListen, four, none4, 7), inetSocket{stateListen, four, none4, false, Unknown}},
		{diagMessage(unix.AF_INET, stateListen, four, none4, 7, 0, 0), inetSocket{stateListen, four, none4, false, Absent}},
		{diagMessage(unix.AF_INET6, stateListen, six, none6, 7, transparentBit(), 0), inetSocket{stateListen, six, none6, false, Works}},
		{diagMessage(unix.AF_INET6, stateFinWait2, mapped, mapped, 0), inetSocket{stateFinWait2, netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("10.0.0.1:80"), true, Unknown}},
	} {
		if got, ok := parseDiag(tt.b); !ok || got != tt.want {
			t.Errorf("got %+v, want %+v", got, tt.want)
		}
	}
	if got, ok := parseDiag(make([]byte, 71)); ok {
		t.Errorf("too short, and read as %+v", got)
	}
}

func FuzzParseDiag(f *testing.F) {
	at := netip.MustParseAddrPort("127.0.0.1:15006")
	f.Add(diagMessage(unix.AF_INET, stateListen, at, at, 7, 0x20, 0))
	f.Add(diagMessage(unix.AF_INET6, stateEstablished, at, at, 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, ok := parseDiag(b); ok != (len(b) >= 72) || (ok && !s.from.IsValid()) {
			t.Errorf("%d bytes: %+v, %v", len(b), s, ok)
		}
	})
}
