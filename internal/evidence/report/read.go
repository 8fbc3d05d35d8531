package report

import (
	"encoding/binary"
	"fmt"
	"unicode/utf8"
)

// reader takes data items of CBOR (RFC 8949, 3) off the front of what is left, of
// the types and in the places that evidence.cddl has, and nothing else: a tenth of
// what it takes by reflection. What it gives refers to what it reads. After an
// error it gives zeros.
type reader struct {
	b   []byte
	err error
}

// Major types.
const (
	unsigned   = 0
	negative   = 1
	byteString = 2
	textString = 3
	arrayOf    = 4
	mapOf      = 5
	simple     = 7
)

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, args...)
	}
	r.b = nil
}

// end is the error, if there was one or something is left.
func (r *reader) end() error {
	if len(r.b) > 0 {
		r.fail("%d bytes follow it", len(r.b))
	}
	return r.err
}

// major is the type of the next item.
func (r *reader) major() byte {
	if len(r.b) == 0 {
		return simple
	}
	return r.b[0] >> 5
}

// head takes the head of an item of a major type, of definite length, and gives
// its argument.
func (r *reader) head(major byte) uint64 {
	if len(r.b) == 0 || r.b[0]>>5 != major {
		r.fail("it is cut off, or an item is not of major type %d", major)
		return 0
	}
	info := r.b[0] & 31
	if info < 24 {
		r.b = r.b[1:]
		return uint64(info)
	}
	size := 1 << (info - 24)
	if info > 27 || len(r.b) < 1+size {
		r.fail("the head of an item is cut off, or of indefinite length")
		return 0
	}
	var wide [8]byte
	copy(wide[8-size:], r.b[1:])
	r.b = r.b[1+size:]
	return binary.BigEndian.Uint64(wide[:])
}

func (r *reader) uint() uint64 { return r.head(unsigned) }

func (r *reader) int() int64 {
	major := r.major()
	if major != negative {
		major = unsigned
	}
	n := r.head(major)
	if n > 1<<63-1 {
		r.fail("a number is out of bounds")
		return 0
	}
	if major == negative {
		return -1 - int64(n)
	}
	return int64(n)
}

func (r *reader) bool() bool {
	if len(r.b) == 0 || r.b[0]>>1 != simple<<4|20>>1 { // false and true are f4 and f5
		r.fail("an item is no bool")
		return false
	}
	v := r.b[0]&1 != 0
	r.b = r.b[1:]
	return v
}

func (r *reader) string(major byte) []byte {
	n := r.head(major)
	if n > uint64(len(r.b)) {
		r.fail("a string is cut off")
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) bytes() []byte { return r.string(byteString) }

func (r *reader) text() string {
	b := r.string(textString)
	if !utf8.Valid(b) {
		r.fail("a text is not UTF-8")
	}
	return string(b)
}

func (r *reader) uuid() (u [16]byte) {
	if b := r.bytes(); len(b) == len(u) {
		return [16]byte(b)
	}
	r.fail("a UUID has not 16 bytes")
	return u
}

// fields takes a map whose keys are 1 to last, each at most once, in any order.
// field takes the value of one.
func (r *reader) fields(last uint64, field func(key uint64)) {
	var seen uint64
	for n := r.head(mapOf); n > 0 && r.err == nil; n-- {
		key := r.uint()
		if key == 0 || key > last || seen&(1<<key) != 0 {
			r.fail("a key %d is not known, or there twice", key)
			return
		}
		seen |= 1 << key
		field(key)
	}
}

// list takes an array of at most most elements. Room is not made for as many as
// somebody claims that there are, but as they come.
func list[T any](r *reader, most uint64, element func(*T)) []T {
	n := r.head(arrayOf)
	if n > most || n > uint64(len(r.b)) {
		r.fail("an array of %d elements", n)
		return nil
	}
	all := make([]T, 0, min(n, 64))
	for ; n > 0 && r.err == nil; n-- {
		var zero T
		all = append(all, zero)
		element(&all[len(all)-1])
	}
	return all
}

func (e *Evidence) read(r *reader) {
	r.fields(6, func(key uint64) {
		switch key {
		case 1:
			e.Version = uint(r.uint())
		case 2:
			e.Nonce = r.bytes()
		case 3:
			e.Report = r.bytes()
		case 4:
			e.Quote.read(r)
		case 5:
			e.PCRs = r.banks()
		case 6:
			e.Logs = r.logs()
		}
	})
}

func (q *Quote) read(r *reader) {
	r.fields(2, func(key uint64) {
		switch key {
		case 1:
			q.Attest = r.bytes()
		case 2:
			q.Signature = r.bytes()
		}
	})
}

func (r *reader) banks() Banks {
	return list(r, uint64(len(sizes)), func(b *Bank) {
		r.fields(2, func(key uint64) {
			switch key {
			case 1:
				b.Algorithm = r.text()
			case 2:
				r.values(&b.Values)
			}
		})
	})
}

func (r *reader) values(v *Values) {
	for n := r.head(mapOf); n > 0 && r.err == nil; n-- {
		pcr := r.uint()
		if pcr >= numPCRs || v[pcr] != nil {
			r.fail("a PCR %d is there twice, or is none", pcr)
			return
		}
		v[pcr] = r.bytes()
	}
}

func (r *reader) logs() []Log {
	return list(r, MaxLogs, func(l *Log) {
		r.fields(5, func(key uint64) {
			switch key {
			case 1:
				l.Kind = r.text()
			case 2:
				l.From = r.uint()
			case 3:
				l.Data = r.bytes()
			case 4:
				l.More = r.bool()
			case 5:
				l.Problem = r.text()
			}
		})
	})
}

func (p *Report) read(r *reader) {
	r.fields(7, func(key uint64) {
		switch key {
		case 1:
			p.Version = uint(r.uint())
		case 2:
			p.AK = r.bytes()
		case 3:
			p.BootID = r.text()
		case 4:
			p.Time = r.int()
		case 5:
			p.Host.read(r)
		case 6:
			p.VMs = list(r, MaxVMs, func(v *VM) { v.read(r) })
		case 7:
			p.Deleted = list(r, MaxDeleted, func(d *Deleted) { d.read(r) })
		}
	})
}

func (h *Host) read(r *reader) {
	r.fields(9, func(key uint64) {
		switch key {
		case 1:
			h.Name = r.text()
		case 2:
			h.Software = r.text()
		case 3:
			h.Mode = r.text()
		case 4:
			h.ListState = r.text()
		case 5:
			h.ListGeneration = r.uint()
		case 6:
			h.ListCounter = r.uint()
		case 7:
			h.LaunchPCR = uint(r.uint())
		case 8:
			h.LaunchLog = r.text()
		case 9:
			h.Kernel = r.text()
		}
	})
}

func (v *VM) read(r *reader) {
	r.fields(14, func(key uint64) {
		switch key {
		case 1:
			v.UUID = r.uuid()
		case 2:
			v.Name = r.text()
		case 3:
			v.State = r.text()
		case 4:
			v.Running = r.bool()
		case 5:
			v.Generation = r.uint()
		case 6:
			v.LabelGeneration = r.uint()
		case 7:
			v.EK = r.bytes()
		case 8:
			v.EKCertificate = r.bytes()
		case 9:
			v.Verdict = r.text()
		case 10:
			v.Reason = r.text()
		case 11:
			v.PCRs = new(Reading)
			v.PCRs.read(r)
		case 12:
			v.Quote = new(VTPMQuote)
			v.Quote.read(r)
		case 13:
			v.Problem = r.text()
		case 14:
			v.Logs = r.logs()
		}
	})
}

func (p *Reading) read(r *reader) {
	r.fields(3, func(key uint64) {
		switch key {
		case 1:
			p.Reader = r.text()
		case 2:
			p.Time = r.int()
		case 3:
			p.Banks = r.banks()
		}
	})
}

func (q *VTPMQuote) read(r *reader) {
	r.fields(2, func(key uint64) {
		switch key {
		case 1:
			q.Quote.read(r)
		case 2:
			q.AK = r.bytes()
		}
	})
}

func (d *Deleted) read(r *reader) {
	r.fields(3, func(key uint64) {
		switch key {
		case 1:
			d.UUID = r.uuid()
		case 2:
			d.Time = r.int()
		case 3:
			d.Why = r.text()
		}
	})
}
