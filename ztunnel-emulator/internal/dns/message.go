package dns

import (
	"encoding/binary"
	"errors"
	"strconv"
	"strings"

	miekg "github.com/miekg/dns"
)

// A message's header (RFC 1035, 4.1.1): id, two bytes of flags, and the numbers
// of questions, answers, authorities and additional records.
const (
	headerSize = 12

	flagQR = 0x80 // of byte 2: an answer
	opcode = 0x78
	flagTC = 0x02
	flagRD = 0x01
	flagRA = 0x80 // of byte 3
	flagCD = 0x10
	rcode  = 0x0f
)

// minUDP is what everybody takes over UDP, and who sends no OPT record (RFC 6891)
// takes no more.
const minUDP = 512

// replySize is what the answers made here promise to take: what fits every path.
const replySize = 1232

func idOf(msg []byte) uint16      { return binary.BigEndian.Uint16(msg) }
func setID(msg []byte, id uint16) { binary.BigEndian.PutUint16(msg, id) }
func rcodeOf(msg []byte) int      { return int(msg[3] & rcode) }
func rcodeName(msg []byte) string {
	if name, known := miekg.RcodeToString[rcodeOf(msg)]; known {
		return name
	}
	return strconv.Itoa(rcodeOf(msg))
}

func questions(msg []byte) int { return int(binary.BigEndian.Uint16(msg[4:])) }

// complains tells a response that calls something else no query. The port is open
// to other pods, and another proxy, whose address somebody has written on a
// datagram, complains of our complaint: answering it would never end.
func complains(msg []byte) bool {
	return msg[2]&flagQR != 0 && rcodeOf(msg) == miekg.RcodeFormatError
}

// query is a client's message and what must be known of it.
type query struct {
	msg      []byte
	question miekg.Question // zero if there is none
	end      int            // of the question section
	opt      []byte         // the OPT record, if there is one
	size     int            // bytes that the client takes over UDP
}

// parseQuery looks at a message of at least headerSize bytes. rcode says what is
// wrong with it, and is 0 for what should be forwarded.
func parseQuery(msg []byte) (q query, rcode int) {
	q = query{msg: msg, end: headerSize, size: minUDP}
	question, end, err := readQuestion(msg)
	if err == nil {
		q.question, q.end = question, end
		q.opt = findOPT(msg, end)
	}
	if q.opt != nil { // its class is the size
		q.size = max(minUDP, int(binary.BigEndian.Uint16(q.opt[3:])))
	}
	switch {
	case msg[2]&flagQR != 0:
		return q, miekg.RcodeFormatError
	case msg[2]&opcode != miekg.OpcodeQuery<<3:
		return q, miekg.RcodeNotImplemented
	case err != nil:
		return q, miekg.RcodeFormatError
	}
	return q, miekg.RcodeSuccess
}

var errQuestion = errors.New("unreadable question section")

// readQuestion reads the only question of a message, or none: a query for server
// cookies has none (RFC 7873, 5.4), and none has two (RFC 9619).
func readQuestion(msg []byte) (question miekg.Question, end int, err error) {
	switch questions(msg) {
	case 0:
		return question, headerSize, nil
	case 1:
	default:
		return question, 0, errQuestion
	}
	end, whole := skipName(msg, headerSize)
	if !whole || end+4 > len(msg) { // the first name has none before it to point to
		return question, 0, errQuestion
	}
	question.Name, _, err = miekg.UnpackDomainName(msg, headerSize)
	question.Qtype = binary.BigEndian.Uint16(msg[end:])
	question.Qclass = binary.BigEndian.Uint16(msg[end+2:])
	return question, end + 4, err
}

// skipName returns where the name at off ends, and whether all of it stands
// there: no pointer (RFC 1035, 4.1.4), and nothing cut off.
func skipName(msg []byte, off int) (end int, whole bool) {
	for off < len(msg) {
		switch n := int(msg[off]); {
		case n == 0:
			return off + 1, true
		case n >= 0xc0:
			return off + 2, false
		case n >= 0x40: // reserved
			return len(msg), false
		default:
			off += 1 + n
		}
	}
	return len(msg), false
}

// findOPT returns the OPT record among the additional ones of a message whose
// records begin at off, or nil. A record that can't be read ends the search; it is
// the resolver's to complain.
func findOPT(msg []byte, off int) []byte {
	count := func(at int) int { return int(binary.BigEndian.Uint16(msg[at:])) }
	before := count(6) + count(8)
	for i := range before + count(10) {
		start := off
		// Behind the name: type, class, TTL, and the length of the data.
		if off, _ = skipName(msg, off); off+10 > len(msg) {
			return nil
		}
		kind := binary.BigEndian.Uint16(msg[off:])
		end := off + 10 + int(binary.BigEndian.Uint16(msg[off+8:]))
		if end > len(msg) {
			return nil
		}
		if i >= before && kind == miekg.TypeOPT && off == start+1 { // the root's name is one byte
			return msg[start:end]
		}
		off = end
	}
	return nil
}

// isAnswer tells whether msg answers the query that was sent with id. An error
// may come without the question: who could not read it can't repeat it.
func (q query) isAnswer(msg []byte, id uint16) bool {
	if len(msg) < headerSize || idOf(msg) != id || msg[2]&flagQR == 0 || msg[2]&opcode != q.msg[2]&opcode {
		return false
	}
	if questions(msg) == 0 && rcodeOf(msg) != miekg.RcodeSuccess {
		return true
	}
	got, _, err := readQuestion(msg)
	return err == nil && got.Qtype == q.question.Qtype && got.Qclass == q.question.Qclass &&
		strings.EqualFold(got.Name, q.question.Name) // escaped, so all ASCII
}

// reply makes an answer of our own: the query's id and question, no records.
func (q query) reply(code int) []byte {
	return q.bare(flagQR|q.msg[2]&(opcode|flagRD), byte(flagRA|int(q.msg[3]&flagCD)|code))
}

// truncate makes of an answer that is too large one that says so. What is left
// is no part of the answer (RFC 2181, 9).
func (q query) truncate(answer []byte) []byte { return q.bare(answer[2]|flagTC, answer[3]) }

// bare is the query's question, below the flags of an answer. Who has sent an OPT
// record gets one (RFC 6891, 6.1.1), or takes us for a server of 1987.
func (q query) bare(flags2, flags3 byte) []byte {
	b := append([]byte(nil), q.msg[:q.end]...)
	b[2], b[3] = flags2, flags3
	clear(b[4:headerSize])
	if q.end > headerSize {
		b[5] = 1
	}
	if q.opt != nil {
		b[11] = 1
		dnssecOK := q.opt[7] & 0x80 // repeated (RFC 3225, 3)
		b = append(b, 0, 0, byte(miekg.TypeOPT), replySize>>8, replySize&0xff, 0, 0, dnssecOK, 0, 0, 0)
	}
	return b
}
