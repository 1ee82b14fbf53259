//! What Go's JSON scanner says about a malformed document. Only errors come here.

/// Upstream's bound on nesting is far beyond what the parser's own allows; both are an error of the client.
const TOO_DEEP: &str = "exceeded max depth";

/// Go's text for a document that serde_json refused with `error`.
pub fn describe(body: &[u8], error: &serde_json::Error) -> String {
    let mut scanner = Scanner { body, at: 0, depth: 0 };
    match scanner.document() {
        Err(Fault::End) => "unexpected end of JSON input".to_owned(),
        Err(Fault::Byte(context)) => format!("invalid character {} {context}", quote(body[scanner.at])),
        Err(Fault::Depth) => TOO_DEEP.to_owned(),
        // Go accepts what serde_json does not: lone surrogates, invalid UTF-8.
        Ok(()) => error.to_string(),
    }
}

enum Fault {
    End,
    Byte(String),
    Depth,
}

struct Scanner<'a> {
    body: &'a [u8],
    at: usize,
    depth: usize,
}

fn fault<T>(context: &str) -> Result<T, Fault> {
    Err(Fault::Byte(context.to_owned()))
}

impl Scanner<'_> {
    fn peek(&self) -> Result<u8, Fault> {
        self.body.get(self.at).copied().ok_or(Fault::End)
    }

    fn space(&mut self) {
        while matches!(self.body.get(self.at), Some(b' ' | b'\t' | b'\r' | b'\n')) {
            self.at += 1;
        }
    }

    fn document(&mut self) -> Result<(), Fault> {
        self.value()?;
        self.space();
        if self.at < self.body.len() { fault("after top-level value") } else { Ok(()) }
    }

    fn value(&mut self) -> Result<(), Fault> {
        self.space();
        match self.peek()? {
            b'{' => self.nested(Self::object),
            b'[' => self.nested(Self::array),
            b'"' => self.string(),
            b't' => self.literal("true"),
            b'f' => self.literal("false"),
            b'n' => self.literal("null"),
            b'-' | b'0'..=b'9' => self.number(),
            _ => fault("looking for beginning of value"),
        }
    }

    fn nested(&mut self, inner: fn(&mut Self) -> Result<(), Fault>) -> Result<(), Fault> {
        self.depth += 1;
        if self.depth > 128 {
            return Err(Fault::Depth);
        }
        self.at += 1;
        inner(self)?;
        self.depth -= 1;
        Ok(())
    }

    fn object(&mut self) -> Result<(), Fault> {
        self.space();
        if self.peek()? == b'}' {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.space();
            if self.peek()? != b'"' {
                return fault("looking for beginning of object key string");
            }
            self.string()?;
            self.space();
            if self.peek()? != b':' {
                return fault("after object key");
            }
            self.at += 1;
            self.value()?;
            self.space();
            match self.peek()? {
                b',' => self.at += 1,
                b'}' => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return fault("after object key:value pair"),
            }
        }
    }

    fn array(&mut self) -> Result<(), Fault> {
        self.space();
        if self.peek()? == b']' {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.value()?;
            self.space();
            match self.peek()? {
                b',' => self.at += 1,
                b']' => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return fault("after array element"),
            }
        }
    }

    fn string(&mut self) -> Result<(), Fault> {
        self.at += 1;
        loop {
            match self.peek()? {
                b'"' => {
                    self.at += 1;
                    return Ok(());
                }
                b'\\' => {
                    self.at += 1;
                    match self.peek()? {
                        b'b' | b'f' | b'n' | b'r' | b't' | b'\\' | b'/' | b'"' => self.at += 1,
                        b'u' => {
                            self.at += 1;
                            for _ in 0..4 {
                                if !self.peek()?.is_ascii_hexdigit() {
                                    return fault("in \\u hexadecimal character escape");
                                }
                                self.at += 1;
                            }
                        }
                        _ => return fault("in string escape code"),
                    }
                }
                0..=0x1f => return fault("in string literal"),
                _ => self.at += 1,
            }
        }
    }

    fn literal(&mut self, word: &str) -> Result<(), Fault> {
        for expected in word.bytes() {
            if self.peek()? != expected {
                return fault(&format!("in literal {word} (expecting {})", quote(expected)));
            }
            self.at += 1;
        }
        Ok(())
    }

    fn number(&mut self) -> Result<(), Fault> {
        if self.peek()? == b'-' {
            self.at += 1;
        }
        match self.peek()? {
            b'0' => self.at += 1,
            b'1'..=b'9' => self.digits(),
            _ => return fault("in numeric literal"),
        }
        if self.body.get(self.at) == Some(&b'.') {
            self.at += 1;
            if !self.peek()?.is_ascii_digit() {
                return fault("after decimal point in numeric literal");
            }
            self.digits();
        }
        if matches!(self.body.get(self.at), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek()?, b'+' | b'-') {
                self.at += 1;
            }
            if !self.peek()?.is_ascii_digit() {
                return fault("in exponent of numeric literal");
            }
            self.digits();
        }
        Ok(())
    }

    fn digits(&mut self) {
        while self.body.get(self.at).is_some_and(u8::is_ascii_digit) {
            self.at += 1;
        }
    }
}

/// Go's `quoteChar`.
fn quote(byte: u8) -> String {
    match byte {
        b'\'' => r"'\''".to_owned(),
        b'"' => "'\"'".to_owned(),
        b'\\' => r"'\\'".to_owned(),
        b'\n' => r"'\n'".to_owned(),
        b'\r' => r"'\r'".to_owned(),
        b'\t' => r"'\t'".to_owned(),
        0..=0x1f | 0x7f => format!("'\\x{byte:02x}'"),
        _ => format!("'{}'", char::from(byte)),
    }
}
