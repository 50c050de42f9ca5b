package hbone

import (
	"crypto/rand"
	"encoding/hex"
	"net/netip"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// Header names of requests and responses (reference/hbone.md, 2.1).
const (
	HeaderBaggage           = "baggage"
	HeaderForwarded         = "forwarded"
	HeaderTraceparent       = "traceparent"
	HeaderXForwardedNetwork = "x-forwarded-network"
)

// RequestHeaders are the headers of a CONNECT in the order the real system sends
// them. baggage is sent even if empty; network only on a tunnel's inner CONNECT,
// empty for none.
func RequestHeaders(baggage, forwarded, traceparent, network string) []hpack.HeaderField {
	fields := []hpack.HeaderField{
		{Name: HeaderBaggage, Value: baggage},
		{Name: HeaderForwarded, Value: forwarded},
		{Name: HeaderTraceparent, Value: traceparent},
	}
	if network != "" {
		fields = append(fields, hpack.HeaderField{Name: HeaderXForwardedNetwork, Value: network})
	}
	return fields
}

// Forwarded is the header's value for a client, and the service's hostname if it
// asked for one.
func Forwarded(client netip.AddrPort, host string) string {
	v := `for="` + client.String() + `"`
	if host != "" {
		v += ";host=" + host
	}
	return v
}

// ForwardedHost is the hostname in a forwarded header: of its first host= part,
// without quotes. Empty if there is none or the value is not ASCII.
func ForwardedHost(value string) string {
	for i := range len(value) {
		if value[i] >= 0x80 {
			return ""
		}
	}
	for part := range strings.SplitSeq(value, ";") {
		if host, ok := strings.CutPrefix(strings.TrimSpace(part), "host="); ok {
			if len(host) >= 2 && host[0] == '"' && host[len(host)-1] == '"' {
				host = host[1 : len(host)-1]
			}
			return host
		}
	}
	return ""
}

// NewTraceparent is a random trace and span, not sampled.
func NewTraceparent() string {
	var id [24]byte
	rand.Read(id[:])
	b := make([]byte, 0, traceparentLen)
	b = append(b, "00-"...)
	b = hex.AppendEncode(b, id[:16])
	b = append(b, '-')
	b = hex.AppendEncode(b, id[16:])
	return string(append(b, "-00"...))
}

const traceparentLen = 55

// ParseTraceparent returns value if it is a traceparent, otherwise a new one:
// nothing a peer sends as one is an error.
func ParseTraceparent(value string) string {
	if !isTraceparent(value) {
		return NewTraceparent()
	}
	return value
}

// isTraceparent checks 00-<32 hex>-<16 hex>-00, whatever version and flags.
func isTraceparent(v string) bool {
	if len(v) != traceparentLen {
		return false
	}
	for i := range len(v) {
		dash := i == 2 || i == 35 || i == 52
		hexDigit := v[i] >= '0' && v[i] <= '9' || v[i] >= 'a' && v[i] <= 'f' || v[i] >= 'A' && v[i] <= 'F'
		if dash && v[i] != '-' || !dash && !hexDigit {
			return false
		}
	}
	return true
}
