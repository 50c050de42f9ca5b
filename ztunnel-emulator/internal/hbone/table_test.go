package hbone

import (
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// A peer that empties its table and then allows one again has forgotten what we
// have in ours: the least size must be said as well as the last (RFC 7541, 4.2).
func TestHeaderTableEmptied(t *testing.T) {
	cc, p := rawServerOf(t, quickConfig())
	one := open(cc)
	id := p.request()
	p.headers(id, false, ":status", "200")
	within(t, "the first answer", one).s.Close()

	p.fr.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 0})
	p.fr.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 4096})
	p.expectAlive() // and so they have arrived
	two := open(cc)
	f := p.expect("a request", func(f http2.Frame) bool { return f.Header().Type == http2.FrameHeaders }).(*http2.HeadersFrame)
	fields, err := hpack.NewDecoder(4096, nil).DecodeFull(f.HeaderBlockFragment()) // a table with nothing in it
	if err != nil || len(fields) < 2 || fields[1].Value != "192.0.2.1:80" {
		t.Errorf("got %v, %v", fields, err)
	}
	p.headers(f.StreamID, false, ":status", "200")
	within(t, "the second answer", two).s.Close()
}
